"""Export: a model as a folder that diffusers (see `erw.interop.diffusers`) or another erw loads,
here or on the Hugging Face hub.

DIR/erw.json, README.md      what it is and how it was made, for programs and as a model card
DIR/model.safetensors        with --format safetensors; its VAE in vae/ if it has no public name
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from erw.config import to_dict
from erw.encoders.vae import load_vae
from erw.errors import CheckpointError, ConfigError, one_line
from erw.interop.diffusers import save_vae, write_diffusers
from erw.interop.metadata import METADATA, describe, known_vae, model_card, public, read_metadata
from erw.interop.pretrained import PLAIN_FILE, REPO, open_model
from erw.io import save_tensors, write_json
from erw.training.trained import Trained


def export(
    source: str | Path | Trained,
    out: str | Path,
    *,
    format: str = "diffusers",
    vae: str | None = None,
    checkpoint: str | int = "last",
    repo: str = "",
    **options: Any,
) -> Path:
    """Write a model into the folder `out`, whole or not at all.

    Args:
        source: a loaded model, or the path of one, as for `open_model`.
        out: a new or empty folder.
        format: "diffusers" or "safetensors" (see the module).
        vae: the VAE by name or folder, instead of the model's own.
        checkpoint: of a run: last, best or a step, as for `erw.load`.
        repo: name on the hub for the model card.
        options: how to read a released checkpoint, as for `erw.load_pretrained`.

    Raises:
        ConfigError: unknown format, or `out` is not empty.
        CheckpointError, FileNotFoundError: the source cannot be read, is a warm-up, or has no
            place in the format; its VAE is missing or does not fit.
    """
    if format not in ("diffusers", "safetensors"):
        raise ConfigError(f"format is {format!r}; expected diffusers, safetensors")
    out = Path(out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; export into a new folder, or delete it first")
    if not isinstance(model := source, Trained):
        model = open_model(source, checkpoint=checkpoint, **options)
    if model.missing:
        raise CheckpointError(
            f"{model.source} is a warm-up, {len(model.missing)} parameters are not in it: train on "
            "from it (erw train RECIPE --init), then export the run"
        )
    if model.run.model.net == "rdm" or model.run.model.class_token == "given":
        raise CheckpointError(f"{model.run.name} is half of a pair, an export holds one network")
    exported = bool(model.source) and (Path(model.source) / METADATA).is_file()
    meta = read_metadata(Path(model.source)) if exported else describe(model)
    name, decoder = vae or model.vae, None
    if vae:
        meta = dataclasses.replace(meta, vae=public(vae))
    if name != "none" and (format == "diffusers" or not known_vae(name)):
        decoder = load_vae(name)
        if decoder.channels != model.net.channels:
            raise CheckpointError(
                f"VAE {name} has {decoder.channels} latent channels, the model "
                f"{model.net.channels}; name its own with vae="
            )
        decoder = decoder.scaled(**model.scaling) if model.scaling else decoder
    tmp = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if format == "diffusers":
            write_diffusers(model, decoder, tmp)
        else:
            save_tensors(tmp / PLAIN_FILE, dict(model.net.named_parameters()), {"format": "pt"})
        if decoder is not None:
            save_vae(decoder, tmp / "vae")
        write_json(tmp / METADATA, to_dict(meta))
        parameters = sum(p.numel() for p in model.net.parameters())
        text = model_card(meta, repo=repo, diffusers=format == "diffusers", parameters=parameters)
        (tmp / "README.md").write_text(text, "utf-8")
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def push_to_hub(
    source: str | Path | Trained,
    repo: str,
    *,
    out: str | Path | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Export a model and upload the folder as the repository `repo`; returns its address.

    Args:
        source: as `export` takes it; an exported folder is uploaded as it is.
        repo: "owner/name"; created if it does not exist.
        out: the exported folder; default: next to the source, its name with "-export" appended.
        private: visibility of a new repository; None: the account's default.
        options: as for `export`.

    Raises:
        ConfigError: no such name, or `out` is missing for a loaded model.
        CheckpointError: as `export`; or the hub refuses or cannot be reached. The folder is then
            complete and can be pushed later.
    """
    if not REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository on the hub; expected owner/name")
    if isinstance(source, Trained):
        if out is None:
            raise ConfigError("out= is missing: the folder in which a loaded model is exported")
        folder = export(source, out, repo=repo, **options)
    elif out is None and (Path(source).expanduser() / METADATA).is_file():
        folder = Path(source).expanduser()
        if options:
            raise ConfigError(f"{folder} is exported already; leave out {', '.join(options)}")
    else:
        path = Path(source).expanduser().resolve()
        name = path.name if path.is_dir() else path.stem
        folder = export(source, out or path.parent / f"{name}-export", repo=repo, **options)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="erw export")
    except Exception as error:  # network, login and rights raise many types
        raise CheckpointError(
            f"could not push to {repo} ({one_line(error)}); {folder} is complete, connect and log "
            f"in (hf auth login), then: erw export {folder} --push {repo}"
        ) from error
    return str(info.commit_url).partition("/commit/")[0]
