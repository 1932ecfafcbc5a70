"""How long the runs of a study take on this machine: timed before they begin, and how many steps
of them fit into the minutes that somebody has."""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from erw.config import Run, from_dict, to_dict
from erw.data.cache import Cache
from erw.dist import world
from erw.errors import ConfigError
from erw.log import read_metrics
from erw.study.results import METRICS
from erw.study.rows import Task, tasks, watching
from erw.study.studies import Study
from erw.training.flops import Ledger
from erw.training.loop import Trainer
from erw.training.network import resolve
from erw.training.objective import build_objective
from erw.training.run_dir import claim

TIMED = 4.0
"""Seconds for which steps of a phase are timed, after the first."""
BEGINS = 8.0
"""Seconds from the start of a run's process to its first step."""


class Pace(NamedTuple):
    """What a run's steps and scores cost: seconds, or FLOPs where nothing was timed."""

    warmup: float  # a step of warm-up
    full: float  # a step of full training
    score: float = 0.0  # all that is looked at after a watched step
    begin: float = 0.0

    def cost(self, run: Run, step: int, scores: int) -> float:
        """Of the first `step` steps and so many scores."""
        warm = min(step, run.plan.warmup)
        return self.begin + warm * self.warmup + (step - warm) * self.full + scores * self.score

    def spent(self, task: Task, out: Path) -> float:
        """What a run has cost so far, by its metrics; 0 before its first line."""
        path = out / task.folder / METRICS
        lines = read_metrics(path) if path.is_file() else []
        scored = {line["step"] for line in lines if line["kind"] == task.kinds[-1]}
        step = max((line["step"] for line in lines), default=0)
        return self.cost(task.run, step, len(scored & {*task.watched})) if lines else 0.0


def timed(study: Study, jobs: int) -> dict[Run, Pace]:
    """The pace of every run of a study whose caches are there, as it will be with `jobs` at a time:
    so many processes of one thread time the same run at once. One job is timed in this process."""
    runs = list(dict.fromkeys(row.run for row in study.rows if row.run))
    arguments = [(to_dict(run), to_dict(study), run is runs[0]) for run in runs]
    if jobs == 1:
        paces = [_pace(*one) for one in arguments]
    else:
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawned, torch.set_num_threads, (1,)) as pool:
            measured = [
                list(pool.map(_pace, *zip(*[one] * jobs, strict=True))) for one in arguments
            ]
        paces = [Pace(*map(max, zip(*same, strict=True))) for same in measured]
    score = paces[0].score  # the runs' samples and scores cost the same
    return {run: pace._replace(score=score) for run, pace in zip(runs, paces, strict=True)}


def _pace(run: dict[str, object], study: dict[str, object], scored: bool) -> Pace:
    """The pace of one run in this process; both are records, which pass between processes."""
    one = from_dict(Run, run)
    cache = Cache.open(one.data.cache)
    resolved = resolve(one, cache)
    with world() as processes, TemporaryDirectory() as folder:
        out = Path(folder)
        recipe = claim(out, one, resolved, cache, Ledger.of(resolved, cache), init=None)
        objective = build_objective(resolved, cache)
        trainer = Trainer(resolved, cache, processes, out, recipe, objective)

        def seconds(step: int) -> float:
            phase = resolved.phase(step)
            trainer.enter(phase)
            begin, times = 0.0, list[float]()
            while len(times) < 4 or (time.monotonic() - begin < TIMED and len(times) < 40):
                now = time.monotonic()
                float(trainer.step(step, phase, trainer.read(step))["loss"])  # a device has ended
                times.append(time.monotonic() - now)
                begin = begin or time.monotonic()
            return median(times[2:])

        full = seconds(one.plan.warmup)
        pace = Pace(seconds(0) if one.plan.warmup else full, full, 0.0, BEGINS)
        if scored:
            task = next(task for task in tasks(from_dict(Study, study)).values() if task.watched)
            look = watching(from_dict(Study, study), task, out, say=lambda text: None)
            now = time.monotonic()
            look["evaluate"](task.watched[0], trainer.ema_model(0), processes)
            pace = pace._replace(score=time.monotonic() - now)
    return pace


def left(todo: Mapping[str, Task], out: Path, paces: Mapping[str, Pace], jobs: int) -> float:
    """What is left to do of some runs, `jobs` at a time in their order: until the last has ended.

    Args:
        paces: by the label of a row.
    """
    free = [0.0] * jobs
    for task in todo.values():
        # A run that begins with a shared warm-up has its lines in its own metrics too.
        pace, shared = paces[task.run.name], todo.get(task.warmup)
        begun = shared.run.steps * pace.warmup if shared else 0.0
        whole = pace.cost(task.run, task.run.steps, len(task.watched))
        place = free.index(min(free))
        free[place] += max(0.0, whole - max(begun, pace.spent(task, out)))
    return max(free)


def with_first(study: Study, steps: int) -> Study:
    """The study whose first run, which says what all of them may cost, has so many steps."""
    first = next(row.run for row in study.rows if row.run)
    return study.changed(lambda run: run.replace(steps=steps) if run == first else run)


def fitted(
    study: Study, seconds: float, paces: Mapping[str, Pace], jobs: int,
    settled: Callable[[Study], Study],
) -> int:  # fmt: skip
    """The steps of the first run with which a study of equal cost ends within `seconds`.

    Args:
        paces: by the label of a row.
        settled: gives every row the steps that cost the same.

    Raises ConfigError if even the shortest study is longer.
    """

    def lasts(steps: int) -> float:
        try:
            todo = tasks(settled(with_first(study, steps)))
        except ConfigError:  # it would end within a warm-up
            return -math.inf
        return left(todo, empty, paces, jobs)

    empty = Path(os.devnull)  # where nothing is done yet
    low, high = 0, 16
    while lasts(high) <= seconds and high < 10**7:
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if lasts(middle) <= seconds else (low, middle)
    if lasts(low) < 0:
        shortest = high
        while lasts(shortest) < 0:
            shortest += shortest // 8
        raise ConfigError(
            f"study {study.name} takes {lasts(shortest) / 60:.1f} minutes here at its shortest, "
            "without its images: give more --minutes"
        )
    return low
