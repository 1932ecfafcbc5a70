"""`erw report`: one page of a study or of training runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from erw.cli.settings import call


def main(args: Sequence[str]) -> None:
    call("report", report, args)


def report(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")], *, out: str
) -> None:
    """Write one self-contained page of a study or of training runs.

    Args:
        runs: folders of training runs, or the one folder of a study.
        out: the page, such as report.html.
    """
    from erw.study.report import report as write

    print(write(runs, out=out))
