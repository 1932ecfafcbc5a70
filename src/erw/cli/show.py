"""`erw show`: recipes, their settings and what they cost."""

from collections.abc import Sequence
from pathlib import Path

from erw import recipes
from erw.cli.cost import account
from erw.cli.settings import Recipe, Settings, as_options, call
from erw.config import Run, to_dict


def main(args: Sequence[str]) -> None:
    if args:
        return call("show", show, args)
    for name in recipes.names():
        print(f"{name:<30}  {recipes.note(name)}")


def show(recipe: Recipe, run: Settings[Run], *, tiny: bool = False) -> None:
    """Print every setting of a recipe as it is typed, then its cost; without RECIPE list them all.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
    """
    print(*as_options(to_dict(run)), "", sep="\n")
    cache = run.data.cache[0]
    exists = "://" in cache or Path(cache).expanduser().exists()
    print("cost", account(run)[-1] if exists else f"is not known without {cache} (see erw cost)")
