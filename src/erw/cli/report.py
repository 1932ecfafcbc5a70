"""`erw report`: one page of plots."""

from __future__ import annotations

from collections.abc import Sequence

from erw.cli.settings import Parser


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
