"""`erw show`: recipes and their settings."""

from __future__ import annotations

from collections.abc import Sequence

from erw.cli.cost import described
from erw.cli.settings import read_recipe


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
