"""`erw train` and `erw show`: recipes, their settings and what they cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from erw.cli.settings import Parser, add_settings, changed, settings, typed
from erw.config import Run
from erw.errors import CacheError, ConfigError
from erw.models.cost import StepCost

if TYPE_CHECKING:
    from erw.training import Init, Trained

BYTES_A_PARAMETER = 4 * (1 + 1 + 2 + 1)  # weight, gradient, AdamW's two moments, EMA, in float32


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
    from erw.log import Console
    from erw.training import train as go

    console = Console(run.name)
    watched = together(watches(run, found.out, say=console.say))
    result = go(run, found.out, init=_init(found, run), reporter=console, **watched)
    print(f"{result.out}: {result.step} steps; next: erw sample {result.out} --out DIR")


class Watch(NamedTuple):
    """What looks at a run while it trains: after which steps, and how."""

    steps: Collection[int]
    look: Callable[[int, Trained], None]


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
        from erw.evaluation.during import scored_steps, scoring

        found.append(Watch(scored_steps(run), scoring(run, out, say=say)))
    if run.log.preview:
        from erw.sampling.preview import preview_steps, previewing

        found.append(Watch(preview_steps(run), previewing(run, out, say=say)))
    return found


def together(found: Sequence[Watch]) -> dict[str, Any]:
    """`at=` and `evaluate=` of `erw.train` for all of them; each is called at its own steps."""

    def look(step: int, model: Trained) -> None:
        for watch in found:
            if step in watch.steps:
                watch.look(step, model)

    return {"at": {step for watch in found for step in watch.steps}, "evaluate": look}


def _init(found: argparse.Namespace, run: Run) -> Init | None:
    """What `--init` names, with labels as the run's cache has them."""
    if not found.init:
        if found.init_projectors:
            raise ConfigError("--init-projectors takes heads over from --init, which is missing")
        return None
    from erw.data.cache import Cache
    from erw.interop import starting_point, with_heads
    from erw.training import build

    cache = Cache.open(run.data.cache)
    resolved = build.resolve(run, cache)
    count = resolved.model.num_classes or 0
    names = cache.class_names if count else ()
    init = starting_point(found.start, run, names, num_classes=count)
    if found.init_projectors:
        init = with_heads(init, resolved.data.features, **found.init_how)
    return init


def show(args: Sequence[str]) -> None:
    """List recipes, or print one with its settings and cost."""
    from erw.recipes import names, note

    if not args:
        width = max(map(len, names()))
        for name in names():
            print(f"{name:<{width}}  {note(name).partition(chr(10))[0]}")
        return
    run, _ = read_recipe("show", args, usage="[--SETTING VALUE ...]")
    print(described(run))


def read_recipe(
    verb: str,
    args: Sequence[str],
    *,
    usage: str,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[Run, argparse.Namespace]:
    """The recipe named first in `args` with the settings after it, and the verb's own options.

    Raises ConfigError for an unknown recipe or setting, with the nearest name.
    """
    from erw.recipes import names, note, recipe, tiny

    named = bool(args) and not args[0].startswith("-")
    if not named and not set(args) & {"-h", "--help"}:
        raise ConfigError(
            f"erw {verb} needs a recipe first, such as {names()[0]}; erw show lists them"
        )
    if not named:
        text = "recipes: " + ", ".join(names())
        text += f"\n\n`erw {verb} RECIPE --help` lists all settings of one with their values."
        parser = Parser(f"erw {verb}", text, usage=f"RECIPE {usage}")
        more(parser)
        parser.parse_args(["--help"])
    run = tiny(recipe(args[0])) if "--tiny" in args else recipe(args[0])
    parser = Parser(f"erw {verb} {args[0]}", note(args[0]), usage=usage)
    more(parser)
    parser.add_argument("--tiny", action="store_true", help="its twin of a few seconds on a CPU")
    add_settings(parser, run)
    found = parser.read(args[1:])
    if vars(found).get("init"):
        from erw.interop import adopted, open_start

        given = vars(found)
        found.init_how = {
            "layout": found.init_layout,
            "num_heads": given.get("model.heads"),
            "depth": given.get("model.depth"),
        }
        found.start = open_start(found.init, **found.init_how)
        run = adopted(run, found.start)
    return changed(run, found), found


def described(run: Run) -> str:
    """A run in full: every setting as it is typed, then parameters, FLOPs, memory and time."""
    lines = [typed(setting) for setting in settings(run)]
    return "\n".join([*lines, "", *costs(run)])


class Known(NamedTuple):
    """What a run costs, as far as it can be known: `run` resolved, its features, cost by part."""

    run: Run
    dims: tuple[int, ...]
    cost: StepCost
    total: int
    warmup: int
    teacher: int


def costs(run: Run) -> list[str]:
    """Lines on parameters, FLOPs, memory and time; one line saying why not, without a cache."""
    try:
        known = known_cost(run)
    except CacheError as error:
        if Path(run.data.cache).expanduser().exists():  # it is there and does not fit
            raise
        return [f"cost: not known without the cache ({error})"]
    from erw.training.build import parameter_count

    model, step = known.run.model, known.cost
    count = parameter_count(known.run)
    heads = sum(
        model.width * model.projector + model.projector**2 + model.projector * (dim + 2) + dim
        for dim in known.dims
    )
    batch = run.data.batch_size
    full, early = step.full + step.projector, step.warmup + step.projector
    lines = [
        f"parameters   {count / 1e6:.1f} M" + f", projectors {heads / 1e6:.1f} M" * bool(heads),
        f"memory       {(count + heads) * BYTES_A_PARAMETER / 2**20:,.0f} MiB for weights, "
        "gradients, AdamW and EMA; activations come on top",
        f"full step    {flops(batch * full)}, {batch} images",
    ]
    if run.plan.warmup:
        warm = run.plan.warmup_batch or batch
        share = f"an image costs {early / full:.2f} of what it does in a full step"
        lines.append(f"warm-up step {flops(warm * early)}, {warm} images; {share}")
    lines += [
        f"run          {flops(known.total)} in {run.steps:,} steps, of which warm-up "
        f"{flops(known.warmup)}, teacher {flops(known.teacher)}",
        f"time         {known.total / 3.6e15:,.2f} h at 1 TFLOP/s; `erw bench` measures what "
        "this machine does",
    ]
    return lines


def known_cost(run: Run) -> Known:
    """Resolve `run` by its cache. Raises CacheError without one, ConfigError if they do not fit."""
    from erw.data.cache import Cache
    from erw.training import build
    from erw.training.ledger import Ledger

    cache = Cache.open(run.data.cache)
    resolved = build.resolve(run, cache)
    cost = build.step_cost(resolved, cache)
    spent = Ledger(run.plan, run.data.batch_size, cost, cache.encoded).spent(run.steps)
    dims = tuple(cache.features[name].dim for name in resolved.data.features)
    return Known(resolved, dims, cost, spent.total, spent.warmup, spent.teacher)


def flops(count: float) -> str:
    """1.5e12 -> "1.50 TFLOP"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.2f} {unit}FLOP"
    return f"{count / 1e6:.2f} MFLOP"
