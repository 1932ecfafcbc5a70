"""`erw bench`: time training steps on this machine."""

import statistics
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from erw.cli.settings import Recipe, Settings
from erw.config import Run
from erw.errors import ConfigError


def bench(recipe: Recipe, run: Settings[Run], *, tiny: bool = False, rounds: int = 10) -> None:
    """Time a recipe's training steps on this machine.

    Whole optimiser steps of each phase, loader and log included, in a short run in a temporary
    folder; the first two steps of a phase are left out.

    Args:
        recipe: its name.
        run: its settings.
        tiny: its twin of a few seconds on a CPU.
        rounds: steps of each phase.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; expected 1 or more")
    from erw.log import read_metrics
    from erw.training.loop import train

    count, hours = rounds + 3, 0.0
    warm = min(run.plan.warmup, count)
    log = replace(run.log, every=1, checkpoint=warm + count, preview=0)
    plan, scores = replace(run.plan, warmup=warm), replace(run.eval, every=0)
    with tempfile.TemporaryDirectory() as folder:
        train(run.replace(steps=warm + count, plan=plan, log=log, eval=scores), folder)
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    for phase, steps in (("warmup", run.plan.warmup), ("full", run.steps - run.plan.warmup)):
        part = [line for line in lines if line["phase"] == phase][2:]
        if len(part) < 2:  # a warm-up of three steps or fewer has nothing to time
            continue
        times = [b["seconds"] - a["seconds"] for a, b in pairwise(part)]
        images, total, teacher = (
            (part[-1][key] - part[0][key]) / len(times)
            for key in ("images", "flops_total", "flops_teacher")
        )
        middle = statistics.median(times)
        hours += steps * middle / 3600
        print(
            f"{phase:<7} {middle:.4f} s a step ({min(times):.4f} to {max(times):.4f}), "
            f"{images:.0f} images, {images / middle:.1f} images/s, "
            f"{(total - teacher) / middle / 1e9:.1f} GFLOP/s, {steps:,} steps"
        )
    print(f"run     {hours:.2f} h of training steps")
