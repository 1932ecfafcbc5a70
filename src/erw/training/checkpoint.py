"""Checkpoints: one safetensors file a step, of a sharded run a folder, loaded strictly.

`step-00001000.safetensors` holds `net.*` (parameters), `ema.*`, `profile.<sigma_rel>.*` where
such averages are tracked, and `optim.<parameter>.<moment>`; its header has the step, the seconds
trained, the running sums of the log, and a hash of it all. `step-00001000/` has the same in shards
(`erw.training.sharded`).
"""

import json
import shutil
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw.config import checked
from erw.dist import as_sharded
from erw.ema import Ema, PowerEmas
from erw.errors import CheckpointError
from erw.io import hash_tensors, load_tensors, misfit, save_tensors

INDEX = "index.json"
"""In the folder of a sharded checkpoint: its header, and a hash of every file."""


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
    saved = [*folder.glob("step-*.safetensors"), *folder.glob("step-*[0-9]")]
    return sorted(saved, key=lambda path: path.stem)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


class Writer:
    """Writes tensors in a thread of its own, one file after the other, while training goes on."""

    def __init__(self) -> None:
        self.thread, self.pending = ThreadPoolExecutor(1, "writer"), list[Future[None]]()

    def begin(
        self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None, *,
        hashed: bool = False, then: Callable[[Path], None] = lambda path: None,
    ) -> None:  # fmt: skip
        """Copy the tensors, which take as much memory again until they are written, and begin.

        Args:
            hashed: put their hash into the header.
            then: called with the path once the file is there.
        """
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        def write() -> None:
            extra = {"hash": hash_tensors(copies)} if hashed else {}
            save_tensors(path, copies, {**(header or {}), **extra})
            then(path)

        self.pending.append(self.thread.submit(write))

    def wait(self) -> None:
        """Until all files are there. Raises the first of their errors, as `save_tensors`."""
        pending, self.pending = self.pending, []
        wait(pending)
        for job in pending:
            job.result()


def save(folder: Path, state: State, position: Position, *, keep: int, to: Any) -> None:
    """Copy what the checkpoint of `position.step` has, and begin to write it; once it is there, all
    but the newest `keep` are deleted.

    `to`: a `Writer`, or a `sharded.Saver`, with which all processes call it.
    """
    tensors, path = _tensors(state), path_of(folder, position.step)
    header = {"progress": json.dumps(position._asdict())}

    def prune(path: Path) -> None:
        others = [other for other in paths(folder) if other != path]
        older = [other for other in others if step_of(other) < position.step]
        again = [other for other in others if step_of(other) == position.step]
        for old in [*older[: max(0, len(older) + 1 - keep)], *again]:
            part = old.rename(old.with_name(f".{old.name}.part"))  # no half is there by its name
            shutil.rmtree(part) if part.is_dir() else part.unlink()

    if isinstance(to, Writer):
        to.begin(path, tensors, header, hashed=True, then=prune)
    else:
        header["tensors"] = str(len(tensors))
        to.begin(path.with_suffix(""), tensors, header, then=prune)


def remove_partial(folder: Path) -> None:
    """Delete what killed runs left half written or half deleted; nobody may be writing now."""
    for part in folder.glob(".step-*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, whole, and the header of a checkpoint. Raises CheckpointError if damaged."""
    tensors, header = _opened(path)
    if path.is_dir():
        sharded().read(path, tensors)
    return tensors, header


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
        tensors, header = _opened(path)
        position = checked(Position, json.loads(header["progress"]), "progress")
        if "hash" in header:
            whole = header["hash"] == hash_tensors(tensors)
        else:  # of an earlier version; or a folder, whose files have hashes
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
            step = torch.zeros((), device=p.device)
            like = {key: step if key == "step" else p for key in moments[p]}
            state.optimizer.state[p] = {k: torch.zeros_like(v) for k, v in like.items()}
    expected, what, hint = _tensors(state), f"{path} is from another model", "choose another --out"
    if not path.is_dir():
        fill(expected, tensors, what=what, hint=hint)
    elif problems := misfit(tensors, expected):
        raise CheckpointError(f"{what}: {problems}; {hint}")
    else:
        sharded().read(path, expected)
    return position


def fill(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, what: str, hint: str,
    optional: Container[str] = (),
) -> None:  # fmt: skip
    """Copy whole `tensors` into `expected`, which may be sharded, by name. Raises CheckpointError,
    with `what` before it and `hint` behind, where `misfit` has something to say."""
    if problems := misfit(tensors, expected, optional=optional):
        raise CheckpointError(f"{what}: {problems}; {hint}")
    with torch.no_grad():
        for name, value in tensors.items():
            expected[name].copy_(as_sharded(value, expected[name]))


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a checkpoint; of a folder the tensors are not yet filled."""
    return sharded().opened(path) if path.is_dir() else load_tensors(path)


def sharded() -> Any:
    """`erw.training.sharded`, which takes long to import."""
    from erw.training import sharded as module

    return module


def _tensors(state: State) -> dict[str, Tensor]:
    """What a checkpoint has, by name: the live tensors, not copied."""
    parameters, moments = dict(state.net.named_parameters()), state.optimizer.state
    groups: dict[str, Mapping[str, Tensor]] = {
        **{"net.": parameters, "ema.": state.ema.tensors},
        **{f"profile.{sigma:g}.": values for sigma, values in state.profiles.tensors.items()},
        **{f"optim.{name}.": moments[p] for name, p in parameters.items() if p in moments},
    }
    return {f"{prefix}{k}": v for prefix, values in groups.items() for k, v in values.items()}
