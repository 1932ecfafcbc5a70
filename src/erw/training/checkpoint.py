"""Checkpoints: one safetensors file a step, loaded strictly.

`step-00001000.safetensors` holds `net.*` (parameters), `ema.*`, `profile.<sigma_rel>.*` where
such averages are tracked, and `optim.<parameter>.<moment>`; its header has the step, the seconds
trained and the running sums of the log.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError
from erw.io import load_tensors, misfit, save_tensors, tensor_header


class Position(NamedTuple):
    """How far a run is: steps, seconds, and the log's sums since its last line (`loop.Sums`)."""

    step: int
    seconds: float
    sums: dict[str, list[float]]


def save(
    folder: Path,
    net: nn.Module,
    ema: Ema,
    profiles: PowerEmas,
    optimizer: torch.optim.Optimizer,
    position: Position,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of `position.step`, then delete all but the newest `keep`."""
    tensors: dict[str, Tensor] = {f"net.{name}": p for name, p in net.named_parameters()}
    tensors |= {f"ema.{name}": value for name, value in ema.tensors.items()}
    for prefix, values in _by_prefix(profiles).items():
        tensors |= {f"{prefix}{name}": value for name, value in values.items()}
    for name, p in net.named_parameters():
        for moment, value in optimizer.state.get(p, {}).items():
            tensors[f"optim.{name}.{moment}"] = value
    path = path_of(folder, position.step)
    header = {"progress": json.dumps(position._asdict()), "tensors": str(len(tensors))}
    save_tensors(path, tensors, header)
    for old in paths(folder)[:-keep]:
        old.unlink()
    return path


def paths(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def load(
    path: Path,
    net: nn.Module,
    ema: Ema,
    profiles: PowerEmas,
    optimizer: torch.optim.Optimizer,
) -> Position:
    """Restore everything that `save` wrote, exactly.

    Raises:
        CheckpointError: the file is truncated, or its tensors are not this model's.
    """
    try:
        tensors, header = load_tensors(path)
    except CheckpointError as error:
        older = [p.name for p in paths(path.parent) if p != path]
        hint = f"; delete it to go on from {older[-1]}" if older else ""
        raise CheckpointError(f"{error}{hint}") from error
    position = position_in(path, header)
    if int(header.get("tensors", len(tensors))) != len(tensors):
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, but {header['tensors']} were written: it was "
            "changed; delete it to go on from the one before"
        )
    parameters = dict(net.named_parameters())
    _check(path, tensors, _expected_moments(tensors, parameters), "optim.")
    restored: dict[str, Mapping[str, Tensor]] = {"net.": parameters, "ema.": ema.tensors}
    for prefix, values in (restored | _by_prefix(profiles)).items():
        _check(path, tensors, values, prefix)
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(tensors[f"{prefix}{name}"])
    optimizer.state.clear()
    for key, value in tensors.items():
        if key.startswith("optim."):
            name, moment = key.removeprefix("optim.").rsplit(".", 1)
            p = parameters[name]
            optimizer.state[p][moment] = value.to(p.device)
    return position


def position(path: Path) -> Position:
    """How far the run was at a checkpoint, from its header alone.

    Raises:
        CheckpointError: missing, truncated, or weights alone.
    """
    return position_in(path, tensor_header(path))


def position_in(path: Path, header: Mapping[str, str]) -> Position:
    if "progress" not in header:
        raise CheckpointError(
            f"{path} holds weights alone, not a checkpoint that training can go on from"
        )
    try:
        values: dict[str, Any] = json.loads(header["progress"])
        return Position(int(values["step"]), float(values["seconds"]), dict(values["sums"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header has no valid progress ({error}); delete it to go on "
            "from the one before"
        ) from error


def fill(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill `net` with the tensors of the file at `path`, strictly.

    Raises:
        CheckpointError: they are not this model's.
    """
    parameters = dict(net.named_parameters())
    _check(path, tensors, parameters)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def _expected_moments(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """AdamW's moments of the parameters that have some; those not trained yet have none."""
    keys = [key for key in tensors if key.startswith("optim.")]
    names = {key.removeprefix("optim.").rpartition(".")[0] for key in keys}
    expected = {}
    for name in names & parameters.keys():
        expected[f"{name}.step"] = torch.zeros(())
        for moment in ("exp_avg", "exp_avg_sq"):
            expected[f"{name}.{moment}"] = parameters[name]
    return expected


def _by_prefix(profiles: PowerEmas) -> dict[str, dict[str, Tensor]]:
    return {f"profile.{sigma:g}.": values for sigma, values in profiles.tensors.items()}


def _check(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Refuse tensors whose names (those with `prefix`) or shapes are not the expected ones."""
    own = {k: v for k, v in tensors.items() if k.startswith(prefix)}
    if problems := misfit(own, {f"{prefix}{k}": v for k, v in expected.items()}):
        raise CheckpointError(
            f"{path} is from another model: {problems}; use the recipe that made it, or another "
            "output folder"
        )
