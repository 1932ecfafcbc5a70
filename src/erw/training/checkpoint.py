"""Checkpoints: one safetensors file a step, written beside and renamed, loaded strictly.

`step-00001000.safetensors` holds `net.*` (parameters), `ema.*`, `profile.<sigma_rel>.*` where
such averages are tracked, and `optim.<parameter>.<moment>`; its header says the step, the seconds
trained and the running sums of the log. No pickle is involved.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError


class Progress(NamedTuple):
    """What a checkpoint says besides tensors: steps, seconds, sums since the last log line."""

    step: int
    seconds: float
    sums: list[float]


def write_beside(tensors: Mapping[str, Tensor], path: Path, *, header: dict[str, str]) -> None:
    """Write a safetensors file so that `path` is either the old file or the whole new one.

    Raises:
        CheckpointError: the disk is full; nothing is left behind but what was there.
    """
    beside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, beside, metadata=header)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise CheckpointError(
            f"could not write {path}: {what}; earlier checkpoints in {path.parent} are untouched, "
            "free some room and run the same command again"
        ) from error


def save(
    folder: Path,
    net: nn.Module,
    ema: Ema,
    profiles: PowerEmas,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    keep: int,
) -> Path:
    """Write the checkpoint of `progress.step`, then delete all but the newest `keep`."""
    tensors: dict[str, Tensor] = {f"net.{name}": p for name, p in net.named_parameters()}
    tensors |= {f"ema.{name}": value for name, value in ema.tensors.items()}
    for prefix, values in _by_prefix(profiles).items():
        tensors |= {f"{prefix}{name}": value for name, value in values.items()}
    for name, p in net.named_parameters():
        for moment, value in optimizer.state.get(p, {}).items():
            tensors[f"optim.{name}.{moment}"] = value
    path = path_of(folder, progress.step)
    told = {"progress": json.dumps(progress._asdict()), "tensors": str(len(tensors))}
    write_beside(tensors, path, header=told)
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
) -> Progress:
    """Restore everything that `save` wrote, exactly.

    Raises:
        CheckpointError: the file is truncated, or its tensors are not this model's.
    """
    tensors, told = read(path)
    done = _progress(path, told)
    if int(told.get("tensors", len(tensors))) != len(tensors):  # older ones do not say
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors, but {told['tensors']} were written: it was "
            "changed; delete it to go on from the one before"
        )
    parameters = dict(net.named_parameters())
    _same_moments(path, tensors, parameters)
    _same(path, tensors, {f"net.{k}": p for k, p in parameters.items()}, prefix="net.")
    _same(path, tensors, {f"ema.{k}": p for k, p in parameters.items()}, prefix="ema.")
    for prefix, values in _by_prefix(profiles).items():
        _same(path, tensors, {f"{prefix}{k}": v for k, v in values.items()}, prefix=prefix)
        for name, value in values.items():
            value.copy_(tensors[f"{prefix}{name}"])
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"net.{name}"])
            ema.tensors[name].copy_(tensors[f"ema.{name}"])
    optimizer.state.clear()
    for key, value in tensors.items():
        if key.startswith("optim."):
            name, moment = key.removeprefix("optim.").rsplit(".", 1)
            p = parameters[name]
            optimizer.state[p][moment] = value.to(p.device)
    return done


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file.

    Raises:
        CheckpointError: missing, truncated or not safetensors.
    """
    with _opened(path) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def header(path: Path) -> dict[str, str]:
    """The header of a safetensors file, without its tensors. Raises CheckpointError as `read`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        older = [p.name for p in paths(path.parent) if p != path]
        hint = f"delete it to go on from {older[-1]}" if older else "it cannot be read"
        raise CheckpointError(
            f"{path} is truncated or not safetensors ({error}); {hint}"
        ) from error


def progress(path: Path) -> Progress:
    """How far the run was at a checkpoint, from its header alone.

    Raises:
        CheckpointError: missing, truncated, or weights alone.
    """
    return _progress(path, header(path))


def _progress(path: Path, told: Mapping[str, str]) -> Progress:
    if "progress" not in told:
        raise CheckpointError(
            f"{path} holds weights alone, not a checkpoint that training can go on from"
        )
    try:
        found = Progress(**json.loads(told["progress"]))
        return Progress(int(found.step), float(found.seconds), [float(s) for s in found.sums])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header says no progress ({error}); delete it to go on from "
            "the one before"
        ) from error


def fill(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill `net` with the tensors of the file at `path`, strictly.

    Raises:
        CheckpointError: they are not this model's.
    """
    parameters = dict(net.named_parameters())
    _same(path, tensors, parameters)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def _same_moments(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    """Refuse moments that AdamW cannot go on with. Parameters not trained yet have none."""
    names = {
        key.removeprefix("optim.").rpartition(".")[0] for key in tensors if key.startswith("optim.")
    }
    want = {}
    for name in names & parameters.keys():
        want[f"optim.{name}.step"] = torch.zeros(())
        for moment in ("exp_avg", "exp_avg_sq"):
            want[f"optim.{name}.{moment}"] = parameters[name]
    _same(path, tensors, want, prefix="optim.")


def _by_prefix(profiles: PowerEmas) -> dict[str, dict[str, Tensor]]:
    return {f"profile.{sigma:g}.": values for sigma, values in profiles.tensors.items()}


def _same(
    path: Path, got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, prefix: str = ""
) -> None:
    """Refuse tensors whose names or shapes are not the model's, naming the first few."""
    have = {k for k in got if k.startswith(prefix)}
    shapes = [
        f"{k} is {tuple(got[k].shape)} not {tuple(want[k].shape)}"
        for k in sorted(have & want.keys())
        if got[k].shape != want[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", sorted(want.keys() - have)),
            ("unexpected", sorted(have - want.keys())),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is from another model: {'; '.join(problems)}; "
            "use the recipe that made it, or another output folder"
        )
