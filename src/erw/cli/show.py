"""`erw show`: recipes, their settings and what they cost."""

from collections.abc import Sequence

from erw.cli.settings import Recipe, Settings, as_options, call
from erw.config import Run, to_dict


def main(args: Sequence[str]) -> None:
    from erw import recipes

    if args:
        return call("show", show, args)
    names = recipes.names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {recipes.note(name)}")


def show(recipe: Recipe, run: Settings[Run], *, tiny: bool = False) -> None:
    """Print every setting of a recipe as it is typed, then its cost; without RECIPE list them all.

    Args:
        recipe: its name.
        tiny: its twin of a few seconds on a CPU.
    """
    from erw.cli.cost import account

    print("\n".join(as_options(to_dict(run))) + "\n")
    print(f"cost {account(run)[-1]}")
