"""Export: a model as a folder that diffusers (see `erw.interop.diffusers`) or another erw loads.

DIR/erw.json, README.md      what it is and how it was made, for programs and as a model card
DIR/model.safetensors        with --format safetensors; its VAE in vae/ if it has no public name
"""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from erw.config import to_dict
from erw.encoders.vae import VAE, load_vae
from erw.errors import CheckpointError, ConfigError
from erw.interop.diffusers import save_vae, write_diffusers
from erw.interop.metadata import (
    METADATA,
    describe,
    known_vae,
    model_card,
    public,
    read_metadata,
)
from erw.interop.pretrained import PLAIN_FILE, open_model
from erw.io import save_tensors, write_json
from erw.training.trained import Trained

FORMATS = ("diffusers", "safetensors")


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
        options: how to read a released checkpoint: layout, num_heads, which, input_size.

    Raises:
        ConfigError: unknown format, or `out` is not empty.
        CheckpointError, FileNotFoundError: the source cannot be read, is a warm-up, or has no
            place in the format; its VAE is missing or does not fit.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected {', '.join(FORMATS)}")
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; export into a new folder, or delete it first")
    model = source
    if not isinstance(model, Trained):
        model = open_model(model, checkpoint=checkpoint, **options)
    if model.missing:
        raise CheckpointError(
            f"{model.source} is a warm-up: {len(model.missing)} parameters of the full model are "
            "not in it; train on from it (erw train RECIPE --init), then export the run"
        )
    if model.run.model.net == "rdm" or model.run.model.class_token == "given":
        raise CheckpointError(
            f"{model.run.name} is half of a pair, representations and images from them; an export "
            "holds one network: copy the run's folder as it is"
        )
    exported = bool(model.source) and (Path(model.source) / METADATA).is_file()
    meta = read_metadata(Path(model.source)) if exported else describe(model)
    if vae:
        meta = dataclasses.replace(meta, vae=public(vae))
    name = vae or model.vae
    needed = name != "none" and (format == "diffusers" or not known_vae(name))
    decoder = _load_vae(name, model) if needed else None
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


def _load_vae(name: str, model: Trained) -> VAE:
    vae = load_vae(name)
    if vae.channels != model.net.channels:
        raise CheckpointError(
            f"VAE {name} has {vae.channels} latent channels, the model {model.net.channels}; name "
            "its own with vae="
        )
    return vae.scaled(**model.scaling) if model.scaling else vae
