"""`erw study`: train and compare methods at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from erw.cli.settings import Settings, as_options, call, first
from erw.study.run import STUDIES, Study, run_study, study_plan

OWN = ("--name", "--methods")  # what makes a study that study, and is no setting


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
        plan: its settings.
        out: folder of the study.
        dry_run: print all settings, do nothing.
    """
    if dry_run:
        print("\n".join(line for line in as_options(plan) if line.split()[0] not in OWN))
    else:
        print(run_study(plan, out))
