"""`erw train`: train a recipe; the same command resumes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from erw import data, interop, training
from erw.cli.settings import Recipe, Settings, call, peek, recipe_of, required
from erw.cli.show import show
from erw.config import Run
from erw.errors import ConfigError
from erw.log import say
from erw.recipes import quickstart
from erw.recipes.quickstart import CACHE
from erw.sinks import sink as to_tracker


def main(args: Sequence[str]) -> None:
    run, start = recipe_of("train", args), None
    if any(word.split("=")[0] == "--init" for word in args):
        start = peek("train", starting_model, args)
        run = interop.adopt(run, start)
    call("train", train, args, start=start, run=run)


def starting_model(
    *,
    init: str,
    init_layout: str = "auto",
    heads: Annotated[int | None, arg(name="model.heads")] = None,
    depth: Annotated[int | None, arg(name="model.depth")] = None,
) -> "training.Trained":
    """The model of `--init`."""
    required(init)
    options: dict[str, Any] = {"layout": init_layout, "num_heads": heads, "depth": depth}
    itself = interop.kind_of(init) in ("run", "export")
    return interop.open_model(init, **({} if itself else options))


def train(
    recipe: Recipe,
    run: Settings[Run],
    *,
    start: "training.Trained | None" = None,
    out: str,
    tiny: bool = False,
    dry_run: bool = False,
    init: str | None = None,
    init_layout: str = "auto",
    init_projectors: bool = False,
) -> None:
    """Train a recipe; the same command resumes.

    Args:
        recipe: its name; `erw show` lists them.
        out: folder of the run.
        tiny: its twin of a few seconds on a CPU.
        dry_run: print settings and cost, train nothing.
        init: begin with the weights of a run or of a released checkpoint.
        init_layout: of a released checkpoint.
        init_projectors: take over its alignment heads too.
    """
    if init_projectors and start is None:
        raise ConfigError("--init-projectors takes heads over from --init, which is missing")
    if not dry_run:
        required(*(path for path in run.data.cache if path != CACHE and "://" not in path))
    from erw.dist import world
    from erw.sampling.solvers import solver_for
    from erw.training.network import resolve

    solver_for(run.sample.solver, run.flow.objective)  # now, not when the first sample is drawn
    if dry_run:
        return show(recipe, run)
    with world() as joined:
        prepare_built_in(run)
        if start is not None:  # its classes and heads become those of the run's cache
            cache = data.Cache.open(run.data.cache)
            resolved = resolve(run, cache)
            count = resolved.model.num_classes or 0
            names = cache.class_names if count else ()
            heads = init_projectors
            start = interop.starting_point(start, resolved, names, count, projectors=heads)
        write = to_tracker(run.log.to, run, out) if run.log.to and joined.first else None
        result = training.train(run, out, init=start, sink=write, **watching(run, out))
        if joined.first:
            print(f"{result.out}: {result.step} steps; next: erw sample {result.out} --out DIR")


def prepare_built_in(run: Run) -> None:
    """Make the cache of the quickstart recipes where it is missing, or finish it; add features that
    the plan names and it has not."""
    if run.data.cache == (CACHE,):
        named = [term.encoder for term in run.plan.active if term.encoder]
        count, token = quickstart.IMAGES, run.model.needs_token
        data.prepare.complete_builtin(Path(CACHE), count=count, encoders=named, class_token=token)


def watching(run: Run, out: str, say: Callable[[str], None] = say) -> dict[str, Any]:
    """`at=` and `evaluate=` of `erw.train` for all scores and pictures that the settings ask for.

    Raises ConfigError where there is nothing to draw, without images or without representations.
    """
    from erw.evaluation.callback import scoring, together, validating
    from erw.sampling.preview import previewing, watched_steps
    from erw.training.trained import RDM

    draws = bool(run.eval.every or run.log.preview)
    if draws and run.model.net == "rdm":
        raise ConfigError("an rdm makes no images: leave eval.every and log.preview at 0")
    if draws and run.model.class_token == "given" and not (Path(out) / RDM).is_dir():
        raise ConfigError(f"no {RDM} in {out} to draw images from: train it first, there")
    every = ((run.eval.every, scoring), (run.eval.loss, validating), (run.log.preview, previewing))
    return together([(watched_steps(run, n), make(run, out, say=say)) for n, make in every if n])
