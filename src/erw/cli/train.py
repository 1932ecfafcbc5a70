"""`erw train`: train a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from erw.cli.cost import described
from erw.cli.settings import read_recipe
from erw.config import Run
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.dist import World
    from erw.training import Trained


def train(args: Sequence[str]) -> None:
    """Train a recipe; the same command goes on where it stopped."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
        parser.add_argument(
            "--dry-run", action="store_true", help="print settings and cost, train nothing"
        )
        parser.add_argument(
            "--init", metavar="PATH", help="begin with a run's or a released checkpoint's weights"
        )
        parser.add_argument(
            "--init-layout", metavar="LAYOUT", default="auto", help="of a released checkpoint"
        )
        parser.add_argument(
            "--init-projectors", action="store_true", help="take over its alignment heads too"
        )

    run, found = read_recipe("train", args, usage="--out DIR [--SETTING VALUE ...]", more=more)
    if found.dry_run:
        print(described(run))
        return
    from erw.log import say
    from erw.training import train as go

    watched = together(watches(run, found.out, say=say))
    result = go(run, found.out, init=_init(found, run), **watched)
    print(f"{result.out}: {result.step} steps; next: erw sample {result.out} --out DIR")


class Watch(NamedTuple):
    """What looks at a run while it trains: after which steps, and how."""

    steps: Collection[int]
    look: Callable[[int, Trained, World], None]


def watches(run: Run, out: str, *, say: Callable[[str], None]) -> list[Watch]:
    """Everything that the settings ask to look at a run while it trains.

    Raises ConfigError where there is nothing to be seen: without images, or representations.
    """
    from erw.training.trained import RDM

    found: list[Watch] = []
    asked = bool(run.eval.every or run.log.preview)
    if asked and run.model.net == "rdm":
        raise ConfigError("an rdm makes no images: leave eval.every and log.preview at 0")
    if asked and run.model.class_token == "given" and not (Path(out) / RDM).is_dir():
        raise ConfigError(
            f"images are drawn from representations, but there is no {RDM} in {out}: train it "
            f"first (--out {out}/{RDM}), or leave eval.every and log.preview at 0"
        )
    if run.eval.every:
        from erw.evaluation.callback import scored_steps, scoring

        found.append(Watch(scored_steps(run), scoring(run, out, say=say)))
    if run.eval.loss:
        from erw.evaluation.validation import validated_steps, validating

        found.append(Watch(validated_steps(run), validating(run, out, say=say)))
    if run.log.preview:
        from erw.sampling.preview import preview_steps, previewing

        found.append(Watch(preview_steps(run), previewing(run, out, say=say)))
    return found


def together(found: Sequence[Watch]) -> dict[str, Any]:
    """`at=` and `evaluate=` of `erw.train` for all of them; each is called at its own steps."""

    def look(step: int, model: Trained, world: World) -> None:
        for watch in found:
            if step in watch.steps:
                watch.look(step, model, world)

    return {"at": {step for watch in found for step in watch.steps}, "evaluate": look}


def _init(found: argparse.Namespace, run: Run) -> Trained | None:
    """The model that `--init` names, adapted to the run's cache."""
    if not found.init:
        if found.init_projectors:
            raise ConfigError("--init-projectors takes heads over from --init, which is missing")
        return None
    from erw.data.cache import Cache
    from erw.interop import starting_point
    from erw.training import build

    cache = Cache.open(run.data.cache)
    resolved = build.resolve(run, cache)
    count = resolved.model.num_classes or 0
    names = cache.class_names if count else ()
    return starting_point(found.start, resolved, names, count, projectors=found.init_projectors)
