"""Export: a model as a folder that diffusers, safetensors or another erw loads.

DIR/erw.json                                    what it is and how it was made
DIR/README.md                                   the same as a model card
--format diffusers                              --format safetensors
DIR/model_index.json, pipeline.py               DIR/model.safetensors
DIR/transformer/  config, weights, code
DIR/scheduler/    FlowMatchEulerDiscreteScheduler
DIR/vae/          AutoencoderKL or AutoencoderTiny
"""

import copy
import json
import os
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erw import __version__
from erw.config import Run, from_dict
from erw.encoders.vae import VAE, load_vae
from erw.errors import CheckpointError, ConfigError
from erw.interop.bundle import bundled
from erw.interop.card import CODE, card
from erw.interop.dit import CODE as DIT_CODE
from erw.interop.dit import check_fits, folded, write_dit
from erw.interop.pretrained import PLAIN_FILE, open_model
from erw.interop.record import RECORD, known_vae, public_name, read_record, record_of
from erw.models import SiT
from erw.training.checkpoint import write_beside
from erw.training.trained import RECIPE, Trained, read_recipe

FORMATS = ("diffusers", "safetensors")
TRAINED_STEPS = 1000  # how diffusers counts time: 1000 t


def export(
    source: str | Path | Trained,
    out: str | Path,
    *,
    format: str = "diffusers",
    vae: str | None = None,
    checkpoint: str | int = "last",
    repo: str = "",
    **told: Any,
) -> Path:
    """Write a model into the folder `out`, whole or not at all.

    Args:
        source: a run's folder or file of weights, an exported folder, a released checkpoint, or
            a loaded model.
        out: a folder that is not there yet, or empty.
        format: "diffusers" or "safetensors" (see the module).
        vae: the VAE by name or folder where it should be another than the model's own.
        checkpoint: of a run: last, best or a step, as for `erw.load`.
        repo: name on the hub for the model card.
        told: for a released checkpoint: layout, num_heads, which, input_size.

    Raises:
        ConfigError: unknown format, or an `out` that holds something.
        CheckpointError, FileNotFoundError: the source cannot be read, is a warm-up, or has no
            place in the format; its VAE is not at hand or does not fit.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected {', '.join(FORMATS)}")
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; export into a new folder, or delete it first")
    model, record = opened(source, checkpoint=checkpoint, **told)
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
    name = vae or model.vae
    if vae:
        record["vae"] = public_name(vae)
    needed = format == "diffusers" or not known_vae(name)
    decoder = _fitting_vae(name, model) if needed and name != "none" else None
    if format == "diffusers" and model.run.flow.objective == "ddpm":
        check_fits(model, decoder)
        decoder = folded(decoder) if decoder else None
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        write = write_diffusers if format == "diffusers" else write_safetensors
        write(model, beside)
        if decoder is not None:
            save_vae(decoder, beside / "vae")
        if format == "diffusers":
            _write_json(beside / "model_index.json", model_index(model, decoder))
        _write_json(beside / RECORD, record)
        count = sum(p.numel() for p in model.net.parameters())
        text = card(record, repo=repo, diffusers=format == "diffusers", parameters=count)
        (beside / "README.md").write_text(text, "utf-8")
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def opened(
    source: str | Path | Trained, *, checkpoint: str | int = "last", **told: Any
) -> tuple[Trained, dict[str, Any]]:
    """A model, and everything known of it. Raises as `export`."""
    if not isinstance(source, Trained):
        folder = Path(source).expanduser()
        model = open_model(folder, checkpoint=checkpoint, **told)
        if (folder / RECORD).is_file():
            return model, read_record(folder)
        return model, record_of(model, _run_folder(folder, model), origin=model.origin)
    return source, record_of(source, origin=source.origin)


def _run_folder(path: Path, model: Trained) -> Path | None:
    """The folder of the run that a folder or file of weights is of; None: it is not around it."""
    near = [
        place for place in (path, path.parent, path.parent.parent) if (place / RECIPE).is_file()
    ]
    if near and from_dict(Run, read_recipe(near[0])["resolved"]) == model.run:
        return near[0]
    return None


def write_safetensors(model: Trained, folder: Path) -> None:
    """The weights by their names in erw."""
    write_beside(dict(model.net.named_parameters()), folder / PLAIN_FILE, header={"format": "pt"})


def write_diffusers(model: Trained, folder: Path) -> None:
    """Transformer with its code, scheduler and pipeline; the VAE and the index come beside."""
    if model.run.flow.objective == "ddpm":
        write_dit(model, folder)
        return
    from diffusers import FlowMatchEulerDiscreteScheduler

    from erw.interop.exported.transformer import FlowTransformer

    run = model.run
    if run.model.needs_token:
        raise CheckpointError(
            f"{run.name} works with class tokens, for which plain diffusers has no pipeline; "
            "choose --format safetensors, or erw convert --to reg"
        )
    names = [name for name in signature(SiT).parameters if hasattr(run.model, name)]
    network = {name: getattr(run.model, name) for name in names if name != "class_token"}
    with torch.device("meta"):
        transformer = FlowTransformer(network, run.flow.prediction, run.flow.path)
    transformer.net = model.net
    transformer.save_pretrained(folder / "transformer", max_shard_size="1TB")
    title = "The network of this folder's model, for diffusers."
    code = bundled("erw.interop.exported.transformer", title=title, version=__version__)
    (folder / "transformer" / CODE).write_text(code, "utf-8")
    shutil.copyfile(Path(__file__).parent / "exported" / "pipeline.py", folder / "pipeline.py")
    scheduler = FlowMatchEulerDiscreteScheduler(TRAINED_STEPS, shift=run.sample.shift)
    scheduler.save_pretrained(folder / "scheduler")


def model_index(model: Trained, vae: VAE | None) -> dict[str, Any]:
    """What diffusers reads first: which class of which file each part is of."""
    import diffusers

    parts: dict[str, Any] = {
        "_class_name": ["pipeline", "FlowPipeline"],
        "transformer": [CODE.removesuffix(".py"), "FlowTransformer"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    if model.run.flow.objective == "ddpm":
        parts = {"_class_name": "DiTPipeline", **DIT_CODE}
    return parts | {
        "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", type(vae.network).__name__] if vae else [None, None],
        "id2label": {str(i): name for i, name in enumerate(model.class_names)},
    }


def save_vae(vae: VAE, folder: Path) -> None:
    """A VAE as diffusers has it, with the shift and scale of its latents in its config."""
    shift, scale = (
        [float(str(np.float32(x))) for x in value.flatten().tolist()]  # 0.18215, not 0.1821500063
        for value in vae.scaling
    )
    config: dict[str, Any] = {"shift_factor": shift[0], "scaling_factor": scale[0]}
    if len(set(shift)) > 1 or len(set(scale)) > 1:
        config = {"shift_factor": None, "scaling_factor": 1.0, "latents_mean": shift}
        config["latents_std"] = [1 / x for x in scale]
    elif "latents_mean" in vae.network.config:
        config |= {"latents_mean": None, "latents_std": None}
    network = copy.deepcopy(vae.network).to(memory_format=torch.contiguous_format)
    network.register_to_config(**config)
    network.save_pretrained(folder)


def _fitting_vae(name: str, model: Trained) -> VAE:
    vae = load_vae(name)
    if vae.channels != model.net.channels:
        raise CheckpointError(
            f"VAE {name} has {vae.channels} latent channels, the model {model.net.channels}; name "
            "its own with vae="
        )
    return vae.scaled(**model.scaling) if model.scaling else vae


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
