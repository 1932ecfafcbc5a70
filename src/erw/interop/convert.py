"""From one released layout to another: tensors are renamed and keep their bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.config import Model
from erw.errors import CheckpointError, ConfigError
from erw.interop.layouts import LAYOUTS, STEPS, TABLE, TIMES, positions, to_diffusers, without_sigma
from erw.interop.pretrained import FILES, OPTIONS, read_released, unusual
from erw.io import replacing, save_tensors
from erw.training.trained import Trained, is_run, load

ALLOWED: dict[str, tuple[str, ...]] = {  # options that a layout's own code has
    "repa": ("qk_norm",),
    "erw": ("qk_norm", "rope"),
    "reg": ("qk_norm", "class_token"),
    "lightningdit": ("rope", "qk_norm", "norm", "mlp", "adaln_shift"),
}


def convert(
    source: str | Path, out: str | Path, *, to: str, layout: str = "auto", **options: Any
) -> str:
    """Write a checkpoint, or a run of ours, in the layout `to`; returns what was read, in words.

    A file written in its own layout has the same bits: 16-bit weights, sigma channels, stored
    positions and projectors come back, a warm-up's file has the blocks it had. A prediction other
    than the velocity and a path other than the linear one are saved with the weights.

    Args:
        source: a run's folder, or what `load_pretrained` takes, with its `options`.
        out: a file; its ending (.pt, .pth, .bin or .safetensors) picks the format.

    Raises CheckpointError: as `load_pretrained`; the layout counts time another way or cannot hold
    the network's options; the file cannot be written.
    """
    if to not in LAYOUTS:
        raise ConfigError(f"layout is {to!r}; expected {', '.join(LAYOUTS)}")
    source, out = Path(source).expanduser(), Path(out)
    file = _of_run(source) if is_run(source) else read_released(source, layout, **options)
    model, layout, tensors = file
    time, flow = TIMES[layout], model.run.flow
    if time != TIMES[to]:
        choices = ", ".join(other for other in LAYOUTS if TIMES[other] == time)
        problem = f"{source} counts time {time}, {to} {TIMES[to]}"
        raise CheckpointError(f"{problem}; weights cannot say that: choose {choices}")
    for name in OPTIONS:
        value, usual = getattr(model.run.model, name), getattr(Model, name)
        needed = to == "reg" and name == "class_token"
        if (value == usual) if needed else (value != usual and name not in ALLOWED.get(to, ())):
            raise CheckpointError(f"{to} has no {name} = {value}; choose another layout")
    if not model.run.data.class_dropout and not is_run(source):  # its row for no class is ours
        tensors[TABLE] = tensors[TABLE][:-1]
    if to not in ("sit", layout) and time != STEPS:
        tensors = without_sigma(tensors)
    if to == "diffusers-dit":
        tensors = to_diffusers(tensors)
    settings = {"layout": to, "prediction": flow.prediction, "path_type": flow.path}
    write_weights(tensors, out, settings if unusual(flow) else {})
    return model.origin


def _of_run(folder: Path) -> tuple[Trained, str, dict[str, Tensor]]:
    """A run of ours as `read_released` has a file: a flow model counts time as REPA and ERW do."""
    model = load(folder)
    run, net = model.run, model.net
    if run.flow.prediction != "velocity" or run.flow.path == "vp":
        differs = ", ".join(unusual(run.flow))
        raise CheckpointError(f"{folder} {differs}; the released layouts of its time do not")
    if run.model.needs_token and not net.class_token:
        raise CheckpointError(f"{folder} works with representations; no released layout has them")
    layout = "reg" if net.class_token else "erw" if run.model.rope else "repa"
    layout = "dit" if run.flow.objective == "ddpm" else layout
    model = replace(model, origin=f"run {run.name}")
    return model, layout, positions(net) | dict(net.named_parameters())


def write_weights(tensors: dict[str, Tensor], path: Path, settings: dict[str, str]) -> None:
    """A bare state dict, or one with settings: in `args` as the peers' training code has them, in
    safetensors in the header. Whole or not at all."""
    if path.suffix not in FILES:
        raise CheckpointError(f"{path}: end the name in {', '.join(FILES)}")
    # Clones: a tensor with several names is stored as often.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, tensors, {"format": "pt", **settings})
        return
    content = {"ema": tensors, "args": settings} if settings else tensors
    try:
        with replacing(path) as tmp:
            torch.save(content, tmp)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"could not write {path}: {error}") from error
