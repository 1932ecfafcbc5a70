"""`erw bench`: time training steps on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from erw.cli.settings import read_recipe
from erw.errors import ConfigError


def bench(args: Sequence[str]) -> None:
    """Time a recipe's training steps on this machine."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=10, help="steps of each phase [10]")

    run, found = read_recipe("bench", args, usage="[--rounds N] [--SETTING VALUE ...]", more=more)
    if found.rounds < 1:
        raise ConfigError(f"--rounds is {found.rounds}; expected 1 or more")
    from erw.study.bench import bench as go

    timings = go(run, rounds=found.rounds)
    for t in timings:
        print(
            f"{t.phase:<7} {t.seconds:.4f} s a step ({t.low:.4f} to {t.high:.4f}), "
            f"{t.images} images, {t.images / t.seconds:.1f} images/s, "
            f"{t.speed / 1e9:.1f} GFLOP/s, {t.steps:,} steps"
        )
    hours = sum(t.steps * t.seconds for t in timings) / 3600
    print(f"run     {hours:.2f} h of training steps")
