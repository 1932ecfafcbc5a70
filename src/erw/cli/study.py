"""`erw study` and `erw report`: methods compared at equal cost, and one page of plots."""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from erw.cli.settings import RunDirs, Settings, as_options, call, first
from erw.config import to_dict
from erw.study.report import report as write_report
from erw.study.run import STUDIES, Study, run_study, study_plan


def study_main(args: Sequence[str]) -> None:
    name = first("study", args, f"a name, one of {', '.join(STUDIES)},")
    call("study", study, args, plan=study_plan(name or next(iter(STUDIES))))


def study(
    name: Annotated[Positional[str], arg(metavar="NAME")],
    plan: Settings[Study],
    *,
    out: str,
    dry_run: bool = False,
) -> None:
    """Train and compare methods at equal total FLOPs; the same command resumes.

    Args:
        name: which study; `erw study` lists them.
        out: folder of the study.
        dry_run: print all settings, do nothing.
    """
    if dry_run:  # name and methods make a study that study, and are no settings
        settings = {k: v for k, v in to_dict(plan).items() if k not in ("name", "methods")}
        print(*as_options(settings), sep="\n")
    else:
        print(run_study(plan, out))


def report(runs: RunDirs, *, out: str) -> None:
    """Write one self-contained page of a study or of training runs.

    Args:
        runs: folders of training runs, or the one folder of a study.
        out: the page, such as report.html.
    """
    print(write_report(runs, out=out))
