"""`erw show`: recipes, their settings and what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from erw.cli.settings import Recipe, Settings, as_options, call, recipe_of
from erw.config import Run


def main(args: Sequence[str]) -> None:
    if args:
        call("show", show, args, run=recipe_of("show", args))
        return
    from erw.recipes import names, note

    width = max(map(len, names()))
    for name in names():
        print(f"{name:<{width}}  {note(name).splitlines()[0]}")


def show(recipe: Recipe, run: Settings[Run], *, tiny: bool = False) -> None:
    """Print every setting of a recipe as it is typed, then its cost; without RECIPE list them all.

    Args:
        recipe: its name.
        run: its settings.
        tiny: its twin of a few seconds on a CPU.
    """
    print(description(run))


def description(run: Run) -> str:
    """Every setting as it is typed, then parameters and FLOPs."""
    from erw.cli.cost import by_cache, by_part

    if parts := by_cache(run):
        cost = [f"cost {parts.origin}", *by_part(parts)]
    else:
        cost = [f"cost: not known without the cache {' '.join(run.data.cache)} (see erw cost)"]
    return "\n".join([*as_options(run), "", *cost])
