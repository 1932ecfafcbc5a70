"""Checkpoints: one safetensors file a step, loaded strictly.

`step-00001000.safetensors` holds `net.*` (parameters), `ema.*`, `profile.<sigma_rel>.*` where
such averages are tracked, and `optim.<parameter>.<moment>`; its header has the step, the seconds
trained, the running sums of the log, and a hash of it all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erw.config import checked
from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError
from erw.io import fill, hash_tensors, load_tensors, save_tensors


class Position(NamedTuple):
    """How far a run is: steps, seconds, and the log's sums since its last line (`Metrics`)."""

    step: int
    seconds: float
    sums: dict[str, list[float]]
    usual: tuple[float, float] = (0.0, 0.0)  # mean loss, and of how many steps (`Trainer.watch`)


class State(NamedTuple):
    """What trains and is averaged."""

    net: nn.Module
    ema: Ema
    profiles: PowerEmas
    optimizer: torch.optim.Optimizer


def paths(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def save(folder: Path, state: State, position: Position, *, keep: int) -> None:
    """Write the checkpoint of `position.step`, then delete all but the newest `keep`."""
    tensors = {name: tensor.cpu() for name, tensor in _tensors(state).items()}
    header = {"progress": json.dumps(position._asdict()), "hash": hash_tensors(tensors)}
    save_tensors(path_of(folder, position.step), tensors, header)
    made = [path for path in paths(folder) if step_of(path) <= position.step]
    for old in made[:-keep]:
        old.unlink()


class Damaged(CheckpointError):
    """A checkpoint is not what `save` wrote."""


def load_newest(folder: Path, state: State) -> tuple[Path | None, Position, list[Damaged]]:
    """Restore the newest checkpoint that is whole: its path, None if there are none, its position,
    and what is wrong with those after it. Raises as `load` if none is whole."""
    damaged: list[Damaged] = []
    for path in reversed(paths(folder)):
        try:
            return path, load(path, state), damaged
        except Damaged as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]
    return None, Position(0, 0.0, {}), []


def load(path: Path, state: State) -> Position:
    """Restore everything that `save` wrote, exactly.

    Raises Damaged: the file is damaged or changed; CheckpointError: its tensors are not this
    model's.
    """
    try:
        tensors, header = load_tensors(path)
        position = checked(Position, json.loads(header["progress"]), "progress")
        if "hash" in header:
            whole = header["hash"] == hash_tensors(tensors)
        else:  # of an earlier version
            whole = len(tensors) == int(header["tensors"])
        if not whole:
            raise ValueError("its tensors are not those that were written")
    except (CheckpointError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = error if isinstance(error, CheckpointError) else f"{path} was changed ({error})"
        raise Damaged(str(reason)) from error
    state.optimizer.state.clear()
    moments = {p: g["moments"] for g in state.optimizer.param_groups for p in g["params"]}
    for name, p in state.net.named_parameters():  # those that have trained have moments
        if any(key.startswith(f"optim.{name}.") for key in tensors):
            like = {key: p.new_zeros(()) if key == "step" else p for key in moments[p]}
            state.optimizer.state[p] = {k: torch.zeros_like(v) for k, v in like.items()}
    fill(
        _tensors(state), tensors, what=f"{path} is from another model", hint="choose another --out"
    )
    return position


def _tensors(state: State) -> dict[str, Tensor]:
    """What a checkpoint has, by name: the live tensors, not copied."""
    parameters, moments = dict(state.net.named_parameters()), state.optimizer.state
    groups: dict[str, Mapping[str, Tensor]] = {
        **{"net.": parameters, "ema.": state.ema.tensors},
        **{f"profile.{sigma:g}.": values for sigma, values in state.profiles.tensors.items()},
        **{f"optim.{name}.": moments[p] for name, p in parameters.items() if p in moments},
    }
    return {f"{prefix}{k}": v for prefix, values in groups.items() for k, v in values.items()}
