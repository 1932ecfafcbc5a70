"""`erw search`: the best of some settings by short trials."""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import arg

from erw.cli.settings import Recipe, Settings, as_options, call
from erw.config import Run
from erw.errors import ConfigError
from erw.study.studies import values_of

WEIGHTS = "plan.align.0.weight.value=0.25,0.5,1,2,4"


def main(args: Sequence[str]) -> None:
    call("search", search, args)


def search(
    recipe: Recipe,
    run: Settings[Run],
    *,
    out: str,
    axes: Annotated[tuple[str, ...], arg(name="over")] = (),
    trials: int = 12,
    tiny: bool = False,
) -> None:
    """Try settings of a recipe in short runs and print the best; the same command goes on, and, in
    another terminal, takes the next trial.

    Args:
        recipe: its name; give it few --steps, and --eval.every for scores.
        out: folder of the search.
        axes: NAME=VALUE,VALUE..., in order; none: warm-up depth, block and weight of alignment.
        trials: at most.
        tiny: its twin of a few seconds on a CPU.
    """
    from erw.cli.train import prepare_built_in
    from erw.study.search import search as found

    if trials < 1:
        raise ConfigError(f"--trials is {trials}: expected at least 1")
    if not axes:
        if not (run.plan.warmup and run.plan.align):
            raise ConfigError(f"{run.name} has no warm-up: give --over NAME=VALUE,VALUE...")
        blocks = ",".join(map(str, range(1, run.model.depth + 1)))
        axes = f"plan.depth={blocks}", f"plan.align.0.block={blocks}", WEIGHTS
    prepare_built_in(run)
    best = found(run, dict(map(values_of, axes)), out, trials=trials)
    print(f"erw train {recipe} {' '.join(as_options(best))} --out DIR")
