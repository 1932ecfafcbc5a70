"""`erw report`, `erw bench` and `erw study`: what was made, how fast, and by which method best."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from erw.cli.runs import read_recipe
from erw.cli.settings import Parser, add_settings, changed, settings, typed
from erw.errors import ConfigError

OWN = ("name", "methods")  # what makes a study that study, and is no setting


def report(args: Sequence[str]) -> None:
    """Write one self-contained page of a study or of training runs."""
    what = "RUN: folders of training runs, or the one folder of a study."
    parser = Parser("erw report", what, usage="RUN... --out FILE")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the page, such as report.html"
    )
    found = parser.read(args)
    from erw.study.report import report as write

    print(write(found.runs, out=found.out))


def bench(args: Sequence[str]) -> None:
    """Time a recipe's training steps on this machine."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=10, help="steps of each phase [10]")

    run, found = read_recipe("bench", args, usage="[--rounds N] [--SETTING VALUE ...]", more=more)
    if found.rounds < 1:
        raise ConfigError(f"--rounds is {found.rounds}; expected 1 or more")
    from erw.study.bench import bench as go

    made = go(run, rounds=found.rounds)
    print(f"{run.name} on {made.device}, {made.precision}")
    for t in made.timings:
        print(
            f"{t.phase:<7} {t.seconds:.4f} s a step ({t.low:.4f} to {t.high:.4f}), "
            f"{t.images} images, {t.images / t.seconds:.1f} images/s, "
            f"{t.speed / 1e9:.1f} GFLOP/s, {t.steps:,} steps"
        )
    print(f"run     {made.total / 3600:.2f} h of training steps")


def study(args: Sequence[str]) -> None:
    """Train and compare methods at equal total FLOPs; the same command goes on."""
    from erw.study.presets import STUDIES, study_plan

    named = bool(args) and not args[0].startswith("-")
    name = args[0] if named else "NAME"
    if not named and not set(args) & {"-h", "--help"}:
        raise ConfigError(f"erw study needs a name: one of {', '.join(STUDIES)}")
    usage = "--out DIR [--SETTING VALUE ...]"
    text = "SiT, REPA and ERW on the built-in images. Studies: " + ", ".join(STUDIES)
    parser = Parser(f"erw study {name}", text, usage=usage)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study")
    parser.add_argument("--dry-run", action="store_true", help="print all settings, do nothing")
    if not named:
        parser.parse_args(["--help"])
    plan = study_plan(name)
    add_settings(parser, plan, leave=OWN)
    found = parser.read(args[1:])
    plan = changed(plan, found)
    if found.dry_run:
        for setting in settings(plan):
            if setting.name not in OWN:
                print(typed(setting))
        return
    from erw.study.demo import run_study

    print(run_study(plan, found.out))
