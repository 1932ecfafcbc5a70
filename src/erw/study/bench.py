"""How long the training steps of a run take on this machine, and so the whole run."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from erw.config import Run
from erw.log import read_metrics
from erw.training.loop import train


class Timing(NamedTuple):
    """Steps of one phase: images in each, seconds (median, least, most), FLOP/s at the median.

    `steps` is how many of the run's steps are in this phase.
    """

    phase: str
    steps: int
    images: int
    seconds: float
    low: float
    high: float
    speed: float


def bench(run: Run, *, rounds: int = 10) -> list[Timing]:
    """Time `rounds` whole optimiser steps of each phase of `run`, loader and log included.

    A short training run of both phases in a temporary folder, whose log has every step; the first
    two steps of a phase are left out. Raises ConfigError or CacheError as `train` does.
    """
    count = rounds + 3
    warm = min(run.plan.warmup, count)
    log = replace(run.log, every=1, checkpoint=warm + count, preview=0)
    plan, scores = replace(run.plan, warmup=warm), replace(run.eval, every=0)
    with tempfile.TemporaryDirectory() as folder:
        train(run.replace(steps=warm + count, plan=plan, log=log, eval=scores), folder)
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    timings = []
    for phase, steps in (("warmup", run.plan.warmup), ("full", run.steps - run.plan.warmup)):
        part = [line for line in lines if line["phase"] == phase][2:]
        if len(part) < 2:  # a warm-up of three steps or fewer has nothing to time
            continue
        times = [b["seconds"] - a["seconds"] for a, b in pairwise(part)]
        images, total, teacher = (
            (part[-1][key] - part[0][key]) // len(times)
            for key in ("images", "flops_total", "flops_teacher")
        )
        middle = statistics.median(times)
        speed = (total - teacher) / middle
        timings.append(Timing(phase, steps, images, middle, min(times), max(times), speed))
    return timings
