"""`erw study`: methods trained and compared at equal cost."""

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from erw.cli.settings import Settings, as_options, call, first
from erw.config import to_dict
from erw.study.studies import STUDIES, Study, study_plan


def main(args: Sequence[str]) -> None:
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
        from erw.study.run import run_study

        print(run_study(plan, out))
