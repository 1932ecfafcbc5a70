"""Checkpoints: one safetensors file a step, loaded strictly.

`step-00001000.safetensors` holds `net.*` (parameters), `ema.*`, `profile.<sigma_rel>.*` where
such averages are tracked, and `optim.<parameter>.<moment>`; its header has the step, the seconds
trained and the running sums of the log.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError
from erw.io import load_tensors, misfit, save_tensors


class Position(NamedTuple):
    """How far a run is: steps, seconds, and the log's sums since its last line (`loop.Sums`)."""

    step: int
    seconds: float
    sums: dict[str, list[float]]


def paths(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def save(
    folder: Path,
    net: nn.Module,
    ema: Ema,
    profiles: PowerEmas,
    optimizer: torch.optim.Optimizer,
    position: Position,
    *,
    keep: int,
) -> None:
    """Write the checkpoint of `position.step`, then delete all but the newest `keep`."""
    tensors = _state(net, ema, profiles)
    for name, p in net.named_parameters():
        for moment, value in optimizer.state.get(p, {}).items():
            tensors[f"optim.{name}.{moment}"] = value
    header = {"progress": json.dumps(position._asdict()), "tensors": str(len(tensors))}
    save_tensors(path_of(folder, position.step), tensors, header)
    for old in paths(folder)[:-keep]:
        old.unlink()


def load(
    path: Path, net: nn.Module, ema: Ema, profiles: PowerEmas, optimizer: torch.optim.Optimizer
) -> Position:
    """Restore everything that `save` wrote, exactly.

    Raises:
        CheckpointError: the file is damaged or changed, or its tensors are not this model's.
    """
    try:
        tensors, header = load_tensors(path)
        values = json.loads(header["progress"])
        position = Position(int(values["step"]), float(values["seconds"]), dict(values["sums"]))
        if len(tensors) != int(header["tensors"]):
            raise ValueError(f"{len(tensors)} tensors of {header['tensors']}")
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, CheckpointError) else f"{path} was changed ({error})"
        older = [p.name for p in paths(path.parent) if p != path]
        hint = f"; delete it to go on from {older[-1]}" if older else ""
        raise CheckpointError(f"{reason}{hint}") from error
    parameters = dict(net.named_parameters())
    moments = {k: v for k, v in tensors.items() if k.startswith("optim.")}
    state = _state(net, ema, profiles)
    trained = {key.removeprefix("optim.").rpartition(".")[0] for key in moments}
    expected = state | {
        f"optim.{name}.{moment}": torch.zeros(()) if moment == "step" else parameters[name]
        for name in trained & parameters.keys()
        for moment in ("step", "exp_avg", "exp_avg_sq")
    }
    copy(path, tensors, state, expected)
    optimizer.state.clear()
    for key, value in moments.items():
        name, moment = key.removeprefix("optim.").rsplit(".", 1)
        optimizer.state[parameters[name]][moment] = value.to(parameters[name].device)
    return position


@torch.no_grad()
def copy(
    path: Path,
    tensors: Mapping[str, Tensor],
    into: Mapping[str, Tensor],
    expected: Mapping[str, Tensor] | None = None,
) -> None:
    """Copy the tensors of the file at `path`.

    Raises CheckpointError unless they have the names and shapes `expected`, those of `into`.
    """
    if problems := misfit(tensors, expected or into):
        raise CheckpointError(f"{path} is from another model: {problems}; choose another --out")
    for name, value in into.items():
        value.copy_(tensors[name])


def _state(net: nn.Module, ema: Ema, profiles: PowerEmas) -> dict[str, Tensor]:
    """The live tensors of network and averages, by their names in the file."""
    groups: dict[str, Mapping[str, Tensor]] = {
        **{"net.": dict(net.named_parameters()), "ema.": ema.tensors},
        **{f"profile.{sigma:g}.": values for sigma, values in profiles.tensors.items()},
    }
    return {f"{prefix}{k}": v for prefix, values in groups.items() for k, v in values.items()}
