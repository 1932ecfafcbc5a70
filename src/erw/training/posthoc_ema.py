"""Post-hoc EMA: averages with power-function profiles, stored while training, mixed afterwards.

A run with `optim.ema_profiles` writes them all every `log.snapshot` steps:

    RUN/profiles/step-00001000.safetensors      `<sigma_rel>.<parameter>`, float16 as in EDM2

and the header says the step and t, the updates since the end of warm-up. (In the checkpoints, from
which training goes on, they are float32.) `reconstruct` mixes them by `erw.ema.mix`: of a profile
that was tracked, at a step that was stored, it gives just what is stored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from erw.ema import Mix, Profile, mix
from erw.errors import CheckpointError, ConfigError, NumericsError
from erw.io import load_tensors, save_tensors, tensor_header
from erw.training.checkpoint import path_of, paths
from erw.training.trained import read_recipe

FOLDER = "profiles"


class Snapshot(NamedTuple):
    path: Path
    step: int  # of training
    t: int  # updates in its averages
    sigma_rels: tuple[float, ...]


class Average(NamedTuple):
    """Reconstructed weights by parameter name, float32, and how they were mixed."""

    tensors: dict[str, Tensor]
    step: int
    stored: tuple[Profile, ...]
    mix: Mix


def write(folder: Path, step: int, t: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Store averages by width after `step`, `t` updates. Raises NumericsError beyond float16."""
    tensors = {
        f"{sigma:g}.{name}": value.half()
        for sigma, values in averages.items()
        for name, value in values.items()
    }
    if overflow := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise NumericsError(f"average {overflow[0]} after step {step} is beyond float16's 65504")
    header = {"step": str(step), "t": str(t), "sigma_rels": json.dumps(list(averages))}
    save_tensors(path_of(folder / FOLDER, step), tensors, header)


def snapshots(folder: str | Path) -> list[Snapshot]:
    """What a run has stored, oldest first. Raises CheckpointError where there is nothing."""
    stored = []
    for path in paths(Path(folder) / FOLDER):
        header = tensor_header(path)
        sigma_rels = tuple(json.loads(header["sigma_rels"]))
        stored.append(Snapshot(path, int(header["step"]), int(header["t"]), sigma_rels))
    if not stored:
        read_recipe(Path(folder))  # says so if it is no run at all
        raise CheckpointError(f"{folder} has no averages: train with --optim.ema_profiles 0.05 0.1")
    return stored


def reconstruct(folder: str | Path, sigma_rel: float, *, step: int | None = None) -> Average:
    """The average of the profile `sigma_rel` after `step`, one with a snapshot; None: the last.

    Raises ConfigError: no such width, or no snapshot at that step; CheckpointError: nothing stored,
    or a damaged file.
    """
    by_step = {snapshot.step: snapshot for snapshot in snapshots(folder)}
    last = max(by_step) if step is None else step
    if last not in by_step:
        steps = ", ".join(map(str, by_step))
        raise ConfigError(f"{folder} has no snapshot at step {last}, but at {steps}")
    used = [snapshot for snapshot in by_step.values() if snapshot.step <= last]
    stored = [Profile(sigma, snapshot.t) for snapshot in used for sigma in snapshot.sigma_rels]
    mixed = mix(stored, Profile(sigma_rel, by_step[last].t))
    weights = iter(mixed.weights.tolist())
    total: dict[str, Tensor] = {}
    for snapshot in used:
        shares = {f"{sigma:g}.": next(weights) for sigma in snapshot.sigma_rels}
        tensors = load_tensors(snapshot.path)[0] if any(shares.values()) else {}
        for prefix, share in shares.items():  # "0.05.": the width has a point too
            for key in (key for key in tensors if key.startswith(prefix)):
                name = key.removeprefix(prefix)
                total[name] = total.get(name, 0) + share * tensors[key].double()
    averaged = {name: value.float() for name, value in total.items()}
    return Average(averaged, last, tuple(stored), mixed)


def save(average: Average, folder: str | Path, sigma_rel: float, path: str | Path) -> None:
    """Write an average of the run in `folder` as a file that `erw.load` takes, recipe inside."""
    recipe = read_recipe(Path(folder))
    header = {
        "step": str(average.step),
        "recipe": recipe["resolved"]["name"],
        "average": f"power function of sigma_rel {sigma_rel:g}",
        "run": json.dumps(recipe),
    }
    save_tensors(Path(path), average.tensors, header)
