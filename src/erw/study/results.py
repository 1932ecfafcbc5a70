"""What training runs leave behind, read as curves by name from `recipe.json` and `metrics.jsonl`.

runs = read_runs(["runs/study"])                        # a study's folder, or folders of runs
runs[0].curve("losses", "flow", over="seconds")         # also "weights", "values", "probes"
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from erw.config import flat
from erw.errors import CheckpointError, ConfigError, DataError, raised_as
from erw.io import read_json
from erw.log import read_metrics
from erw.training.run_dir import MAY_CHANGE
from erw.training.trained import read_recipe

METRICS = "metrics.jsonl"
STUDY = "study.json"
COSTS = {"flops": "flops_total", "images": "images", "steps": "step", "seconds": "seconds"}
COSTS["epochs"] = "images"
KINDS = {"losses": "train", "weights": "train", "values": "eval", "validation": "validation"}
KINDS["probes"] = "probe"


class Curve(NamedTuple):
    """Values over a cost that rises from point to point, and the step of each."""

    costs: tuple[float, ...]
    values: tuple[float, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class RunResult:
    """A run's folder as it is read."""

    path: Path
    method: str  # runs that differ in their seed alone share it
    seed: int
    recipe: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]  # of `metrics.jsonl` by kind: train, eval, validation

    @property
    def last(self) -> dict[str, Any]:
        """The last line of training: what the run has cost so far."""
        return self.lines["train"][-1]

    @property
    def finished(self) -> bool:
        return self.last["step"] >= self.recipe["run"]["steps"]

    @property
    def warmup(self) -> dict[str, Any] | None:
        """The line at which warm-up ends."""
        return next((x for x in self.lines["train"][::-1] if x["phase"] == "warmup"), None)

    def names(self, group: str) -> list[str]:
        """What there is a curve of in "losses", "weights" or "values"."""
        return list(dict.fromkeys(name for x in self.lines[KINDS[group]] for name in x[group]))

    def curve(self, group: str, name: str, *, over: str = "flops", scale: float = 1.0) -> Curve:
        """A loss, weight, score or validation loss over a cost of `COSTS`, as a running total in
        units of `scale`. Epochs are images by those in the cache."""
        if over not in COSTS:
            raise ConfigError(f"no cost {over!r}; choose one of {', '.join(COSTS)}")
        scale *= self.recipe["cache"]["rows"] if over == "epochs" else 1
        points = [
            (line[COSTS[over]] / scale, values[name], line["step"])
            for line in self.lines[KINDS[group]]
            if name in (values := line if group == "validation" else line[group])
        ]
        return Curve(*zip(*points, strict=True)) if points else Curve((), (), ())


def read_runs(paths: Sequence[str | Path]) -> list[RunResult]:
    """The runs in these folders (of runs, or of a study), a method's seeds one after another.

    Runs of the same settings but for their seed are one method, named by its recipe. Where two
    methods would share a name, each takes that of its first run's folder.

    Raises FileNotFoundError: no run in a folder; DataError: a run is named twice, or has no line of
    training yet; CheckpointError: a damaged file.
    """
    folders = [folder for path in paths for folder in _folders(Path(path))]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError(f"a run is named twice: {', '.join(map(str, folders))}")
    methods: dict[tuple[str, int], list[RunResult]] = {}
    copies = Counter[tuple[str, int]]()  # the same run twice is not two seeds of one method
    for folder in folders:
        recipe = read_recipe(folder)
        kind, seed = _kind(recipe), recipe["resolved"]["seed"]
        copies[kind, seed] += 1
        run = RunResult(folder, recipe["run"]["name"], seed, recipe, _lines(folder))
        methods.setdefault((kind, copies[kind, seed]), []).append(run)
    names = [group[0].method for group in methods.values()]
    return [
        replace(run, method=name if names.count(name) == 1 else group[0].path.resolve().name)
        for name, group in zip(names, methods.values(), strict=True)
        for run in sorted(group, key=lambda run: run.seed)
    ]


def by_method(runs: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """The runs of each method, in order."""
    methods = dict.fromkeys(run.method for run in runs)
    return {method: [run for run in runs if run.method == method] for method in methods}


def binned(curve: Curve, *, points: int = 160, warmup: int = 0) -> Curve:
    """A curve averaged in about `points` bins, weighed by the steps between its points.

    A bin's cost is that of its last point. None holds steps of both phases (`warmup`: the last step
    of the first), so that the boundary stays where it is.
    """
    windows, values = np.diff(curve.steps, prepend=0), np.array(curve.values)
    size, start = max(1.0, len(windows) / points), np.searchsorted(curve.steps, warmup, "right")
    phases = np.split(np.arange(len(windows)), [start])
    bins = [x for p in phases if len(p) for x in np.array_split(p, math.ceil(len(p) / size))]
    means = [float(np.average(values[rows], weights=windows[rows])) for rows in bins]
    costs, _, steps = ([column[rows[-1]] for rows in bins] for column in curve)
    return Curve(tuple(costs), tuple(means), tuple(steps))


def read_study(folder: Path) -> dict[str, Any]:
    """The `study.json` of a folder; empty if it has none."""
    return read_json(folder / STUDY) if (folder / STUDY).is_file() else {}


def begun(folder: Path) -> bool:
    """Whether the run of a study, which may be under way, has a line of training yet."""
    path = folder / METRICS
    return path.is_file() and any(line["kind"] == "train" for line in read_metrics(path))


def _folders(path: Path) -> list[Path]:
    """The run folders that a path means: itself, or the runs of a study."""
    if (path / METRICS).is_file():
        return [path]
    names = read_study(path).get("runs", [])
    every = [path / "runs" / name for name in names]
    folders = [folder for folder in every if begun(folder)]
    if not folders:
        raise FileNotFoundError(f"no {METRICS} in {path}: not the folder of a run, nor of a study")
    return folders


def _lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS.values()}
    written = read_metrics(folder / METRICS)
    with raised_as(CheckpointError, f"{folder / METRICS} is damaged"):
        for line in written:
            if line["kind"] == "train" and "losses" not in line:  # as version 0.1 wrote it
                flow = float(line["phase"] != "warmup")
                line["weights"] = {"flow": flow, "align": line["align_weight"]}
                line["losses"] = {k: line[k] for k, weight in line["weights"].items() if weight}
            lines.setdefault(line["kind"], []).append(line)
    if not lines["train"]:
        raise DataError(f"{folder / METRICS} has no training line yet; train first, then report")
    return lines


def _kind(recipe: dict[str, Any]) -> str:
    """Everything that decides a run's numbers but its seed."""
    free = (*MAY_CHANGE, "seed")
    settings = {k: v for k, v in flat(recipe["resolved"]).items() if not k.startswith(free)}
    return json.dumps([settings, recipe["cache"]["identity"]], sort_keys=True)
