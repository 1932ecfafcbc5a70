"""How long the training steps of a run take on this machine, and so the whole run."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from erw.config import Run
from erw.data.cache import Cache
from erw.dist import world
from erw.plan import Phase
from erw.training import build
from erw.training.state import State


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


class Benchmark(NamedTuple):
    """The timings of a run's phases, the seconds that all its steps take, and what it ran on."""

    timings: tuple[Timing, ...]
    total: float
    device: str
    precision: str


def bench(run: Run, *, rounds: int = 10) -> Benchmark:
    """Time `rounds` whole optimiser steps of each phase of `run`, loader included; writes nothing.

    Raises ConfigError or CacheError as `train` does.
    """
    cache = Cache.open(run.data.cache)
    run = build.resolve(run, cache)
    plan, cost = run.plan, build.step_cost(run, cache)
    with world() as here:
        state = State(run, cache, here, Path("none"), build.build_step(run))
        timings = []
        for start, stop in ((0, min(plan.warmup, run.steps)), (plan.warmup, run.steps)):
            if start >= stop:
                continue
            phase = plan(start)
            state.enter(phase)
            seconds = _times(state, phase, start, rounds=rounds)
            network = cost.warmup if phase.warmup else cost.full
            images = plan.batch(start, run.data.batch_size)
            flops = images * (network + (cost.projector if phase.align_weight else 0))
            middle = statistics.median(seconds)
            spread = min(seconds), max(seconds)
            timings.append(
                Timing(phase.name, stop - start, images, middle, *spread, flops / middle)
            )
        device = str(here.device)
        if here.device.type == "cuda":
            device = torch.cuda.get_device_name(here.device)
        precision = f"{str(state.dtype).removeprefix('torch.')} ({state.why_dtype})"
    return Benchmark(tuple(timings), sum(t.steps * t.seconds for t in timings), device, precision)


def _times(state: State, phase: Phase, start: int, *, rounds: int) -> list[float]:
    """Seconds of each of some steps, after two that only warm things up."""
    seconds = []
    for i in range(rounds + 2):
        began = time.perf_counter()
        state.step(start, phase, state.read(start))
        if state.here.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - began)
    return seconds
