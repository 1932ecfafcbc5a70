"""Export: a model as a folder that plain diffusers or another erw loads, here or on the hub.

DIR/erw.json, README.md   what it is and how it was made, for programs and as a model card
DIR/vae/                  its config has the shift and scale of latents
DIR/model_index.json, pipeline.py, transformer/   weights, and code that does not need erw;
DIR/model.safetensors     instead of them, with --format safetensors, and no vae/ with a public name
"""

import copy
import dataclasses
import os
import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erw import __version__
from erw.config import to_dict
from erw.encoders.vae import VAE, load_vae
from erw.errors import CheckpointError, ConfigError, one_line, raised_as
from erw.interop.metadata import METADATA, describe, known_vae, model_card, public, read_metadata
from erw.interop.pretrained import PLAIN_FILE, REPO, open_model
from erw.io import save_tensors, write_json
from erw.models import SiT
from erw.training.trained import Trained

PACKAGE = Path(__file__).parents[1]
SOURCES = ("flow.py", "routing.py", "models/sit.py", "interop/exported/transformer.py")


def export(
    source: str | Path | Trained, out: str | Path, *, format: str = "diffusers",
    vae: str | None = None, checkpoint: str | int = "last", repo: str = "", **options: Any,
) -> Path:  # fmt: skip
    """Write a model into the new folder `out`, whole or not at all.

    Args:
        source: a loaded model, or the path of one; `checkpoint` and `options` as for `open_model`.
        format: "diffusers" or "safetensors" (see the module).
        vae: the VAE by name or folder, instead of the model's own.
        repo: name on the hub for the model card.

    Raises ConfigError, CheckpointError: unknown format, `out` is not empty; the source is a warm-up
    or has no place in the format, or its VAE does not fit.
    """
    if format not in ("diffusers", "safetensors"):
        raise ConfigError(f"format is {format!r}; expected diffusers, safetensors")
    out = Path(out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; export into a new folder, or delete it first")
    model = source
    if not isinstance(model, Trained):
        model = open_model(model, checkpoint=checkpoint, **options)
    sizes = model.run.model
    if model.missing:
        raise CheckpointError(
            f"{model.source} is a warm-up, {len(model.missing)} parameters are not in it: train on "
            "from it (erw train RECIPE --init), then export the run"
        )
    if sizes.net == "rdm" or sizes.class_token == "given":
        raise CheckpointError(f"{model.run.name} is half of a pair, an export holds one network")
    if sizes.needs_token and format == "diffusers":
        raise CheckpointError(f"{model.run.name} has class tokens; choose --format safetensors")
    exported = bool(model.source) and (Path(model.source) / METADATA).is_file()
    with raised_as(CheckpointError, f"what is told of {model.source} is damaged"):
        meta = read_metadata(Path(model.source)) if exported else describe(model)
        meta = dataclasses.replace(meta, vae=public(vae)) if vae else meta
        parameters = sum(p.numel() for p in model.net.parameters())
        card = model_card(meta, repo=repo, diffusers=format == "diffusers", parameters=parameters)
    name, decoder = vae or model.vae, None
    if name != "none" and (format == "diffusers" or not known_vae(name)):
        decoder = load_vae(name)
        if decoder.channels != model.net.channels:
            both = f"{decoder.channels} latent channels, the model {model.net.channels}"
            raise CheckpointError(f"VAE {name} has {both}; name its own with vae=")
        decoder = decoder.scaled(**model.scaling) if model.scaling else decoder
    tmp = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if format == "diffusers":
            _write_diffusers(model, decoder, tmp)
        else:
            save_tensors(tmp / PLAIN_FILE, dict(model.net.named_parameters()), {"format": "pt"})
        if decoder is not None:
            _save_vae(decoder, tmp / "vae")
        write_json(tmp / METADATA, to_dict(meta))
        (tmp / "README.md").write_text(card, "utf-8")
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def push_to_hub(
    source: str | Path | Trained, repo: str, *, out: str | Path | None = None,
    private: bool | None = None, **options: Any,
) -> str:  # fmt: skip
    """Export a model and upload the folder as the repository `repo`; returns its address.

    Args:
        source: as `export` takes it, with its `options`; an exported folder is uploaded as it is.
        repo: "owner/name"; created if it does not exist.
        out: the exported folder; default: next to the source, its name with "-export" appended.
        private: visibility of a new repository; None: the account's default.

    Raises ConfigError, CheckpointError: as `export`; or the hub refuses, and a push can be
    repeated.
    """
    if not REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository on the hub; expected owner/name")
    path = None if isinstance(source, Trained) else Path(source).expanduser().resolve()
    if path is None and out is None:
        raise ConfigError("out= is missing: the folder in which a loaded model is exported")
    if path and out is None and (path / METADATA).is_file():
        folder = path
        if options:
            raise ConfigError(f"{folder} is exported already; leave out {', '.join(options)}")
    else:
        default = path and path.parent / f"{path.name if path.is_dir() else path.stem}-export"
        folder = export(source, out or default, repo=repo, **options)  # type: ignore[arg-type]
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


def _write_diffusers(model: Trained, vae: VAE | None, folder: Path) -> None:
    """Transformer and pipeline with their code."""
    import diffusers

    from erw.interop.exported.transformer import FlowTransformer

    run, code = model.run, folder / "transformer" / "erw_transformer.py"
    sizes = {k: getattr(run.model, k) for k in signature(SiT).parameters if hasattr(run.model, k)}
    sizes |= {"class_token": 0, "representation": 0, "out_channels": model.net.out_channels}
    with torch.device("meta"):
        transformer = FlowTransformer(sizes, run.flow.objective, run.flow.prediction, run.flow.path)
    transformer.net = model.net
    transformer.save_pretrained(code.parent, max_shard_size="1TB")
    code.write_text(transformer_code(), "utf-8")
    shutil.copyfile(PACKAGE / "interop" / "exported" / "pipeline.py", folder / "pipeline.py")
    index = {
        "_class_name": ["pipeline", "FlowPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": [code.stem, "FlowTransformer"],
        "vae": ["diffusers", type(vae.network).__name__] if vae else [None, None],
        "id2label": {str(i): name for i, name in enumerate(model.class_names)},
        "shift": run.sample.shift,
    }
    write_json(folder / "model_index.json", index)


def transformer_code() -> str:
    """The network in one file: erw's sources one after another, without their imports of erw."""
    text = "\n\n".join((PACKAGE / name).read_text("utf-8") for name in SOURCES)
    text = re.sub(r"^from erw\.\S+ import (?:\([^)]*\)|.*)\n", "", text, flags=re.M)
    head = f"{', '.join(SOURCES)} of erw {__version__} (Apache-2.0); needs torch and diffusers."
    return f'"""{head}"""\n\nConfigError = ValueError\n\n{text}'


def _save_vae(vae: VAE, folder: Path) -> None:
    """A VAE as diffusers has it, with the shift and scale of its latents in its config."""
    shift, scale = (
        [float(str(np.float32(x))) for x in value.flatten().tolist()]  # 0.18215, not 0.1821500063
        for value in vae.scaling
    )
    config: dict[str, Any] = {"shift_factor": None, "scaling_factor": 1.0}
    config |= {"latents_mean": shift, "latents_std": [1 / x for x in scale]}
    if len(set(shift)) == len(set(scale)) == 1:
        config = {"shift_factor": shift[0], "scaling_factor": scale[0]}
        config |= {k: None for k in ("latents_mean", "latents_std") if k in vae.network.config}
    config = {} if vae.side else config  # a RAE has them in its weights
    network = copy.deepcopy(vae.network).to(memory_format=torch.contiguous_format)
    network.register_to_config(**config)
    network.save_pretrained(folder)
