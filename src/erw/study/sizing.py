"""How large a study is: which study a folder holds, what work to expect, and steps from hours."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from erw.data.cache import Cache
from erw.encoders.vae import VAE
from erw.errors import CheckpointError, ConfigError
from erw.log import Silent
from erw.models.cost import training_step_flops
from erw.study import measure, point
from erw.study.presets import StudyPlan
from erw.study.progress import Display
from erw.study.results import read_json, read_metrics, write_json
from erw.training.loop import train
from erw.training.trained import load

STUDY = "study.json"
TRIAL_STEPS = 12
TICKS = 2  # a sample is counted when it is drawn and when it is scored
MARGIN = 0.95  # of the hours; the rest is for what no rate foresees


class Guess(NamedTuple):
    """Work by kind, and the seconds a unit of it may take; corrected as soon as it is measured."""

    totals: dict[str, float]
    seconds: dict[str, float]


def guess(plan: StudyPlan) -> Guess:
    """What a study has to do, before anything is opened: rates of two ordinary cores."""
    run = plan.run(plan.methods[0][0], seed=0, cache="")
    side = plan.image_size // 4
    cost = training_step_flops(
        depth=run.model.depth,
        width=run.model.width,
        tokens=(side // run.model.patch) ** 2,
        patch=run.model.patch,
        channels=4,
        warmup_depth=1,
    )
    per_flop = 3e-12
    runs = len(plan.methods) * len(plan.seeds)
    flops = float((plan.steps or 0) * run.data.batch_size * cost.full * runs)
    if plan.hours:
        flops = 0.75 * plan.hours * 3600 / per_flop
    evaluations = (2 if plan.solver == "heun" else 1) * plan.sample_steps
    totals = {
        "prepare": float(plan.train_images),
        "real": float(plan.reference_images + 2 * plan.samples),
        "train": flops,
        "samples": float(TICKS * runs * len(plan.fractions) * plan.samples),
    }
    # A forward is a third of a training step; decoding and scoring come on top.
    sample = (evaluations * cost.full / 3 * per_flop + 0.02) / TICKS
    return Guess(totals, {"prepare": 0.012, "real": 0.015, "train": per_flop, "samples": sample})


def claim(plan: StudyPlan, out: Path) -> None:
    """Write `study.json`, or check that the one that is there is of the same study.

    Raises CheckpointError naming the first difference.
    """
    path = out / STUDY
    told = dataclasses.asdict(plan)
    if not path.is_file():
        others = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
        if others:
            raise CheckpointError(
                f"{out} holds other files and no study ({others[0]}); choose another --out"
            )
        write_json({"plan": told, "steps": plan.steps}, path)
        return
    there = read_json(path)["plan"]
    for key, value in _plain(told).items():
        if there.get(key) != value:
            raise CheckpointError(
                f"{out} holds another study: {key} is {there.get(key)!r} there and {value!r} here; "
                "choose another --out"
            )


def sized(
    plan: StudyPlan, out: Path, cache: Cache, *, scorer: measure.Scorer, vae: VAE, shown: Display
) -> StudyPlan:
    """The plan with its number of steps: as given, as found at the first start, or from hours now.

    Raises ConfigError if the hours do not even pay for scoring.
    """
    if plan.steps is not None:
        return plan
    steps = read_json(out / STUDY)["steps"]
    if not steps:
        shown.show("timing a few steps and samples, to size the study")
        steps = _fitting(plan, out, cache, scorer=scorer, vae=vae, spent=shown.work.elapsed())
        write_json({"plan": dataclasses.asdict(plan), "steps": steps}, out / STUDY)
        shown.say(f"sized to {plan.hours:g} hours: a budget of {steps} full steps a method")
    return dataclasses.replace(plan, steps=steps, hours=None)


def _fitting(
    plan: StudyPlan, out: Path, cache: Cache, *, scorer: measure.Scorer, vae: VAE, spent: float
) -> int:
    """Steps that fit the hours, from the time of a short trial run and of one batch of samples."""
    assert plan.hours
    folder = out / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    run = plan.run(plan.methods[0][0], seed=0, cache=str(cache.path))
    log = dataclasses.replace(run.log, every=1, checkpoint=TRIAL_STEPS)
    train(run.replace(steps=TRIAL_STEPS, log=log), folder, reporter=Silent())
    times = [line["seconds"] for line in read_metrics(folder)]
    step = statistics.median(b - a for a, b in pairwise(times[2:]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = dataclasses.replace(plan, samples=min(plan.samples, 128))
    began = time.monotonic()
    point.scored(small, load(folder, device=device), scorer, vae=vae)
    sample = (time.monotonic() - began) / small.samples
    shutil.rmtree(folder)
    runs = len(plan.methods) * len(plan.seeds)
    scoring = runs * len(plan.fractions) * plan.samples * sample
    left = MARGIN * plan.hours * 3600 - spent - scoring
    steps = int(left / (runs * step))
    if steps < 100:
        raise ConfigError(
            f"{plan.hours:g} hours are too few: preparing took {spent / 3600:.1f} and scoring "
            f"takes {scoring / 3600:.1f}; allow more hours, or fewer samples, points or seeds"
        )
    return steps


def _plain(values: dict) -> dict:
    """As JSON gives it back: tuples become lists."""
    return {k: _listed(v) for k, v in values.items()}


def _listed(value: object) -> object:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value
