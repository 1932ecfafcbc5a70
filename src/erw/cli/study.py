"""`erw study`: train and compare methods at equal cost."""

from __future__ import annotations

from collections.abc import Sequence

from erw.cli.settings import Parser, add_settings, changed, settings, typed
from erw.errors import ConfigError

OWN = ("name", "methods")  # what makes a study that study, and is no setting


def study(args: Sequence[str]) -> None:
    """Train and compare methods at equal total FLOPs; the same command goes on."""
    from erw.study.run import STUDIES, run_study, study_plan

    named = bool(args) and not args[0].startswith("-")
    name = args[0] if named else "NAME"
    if not named and not set(args) & {"-h", "--help"}:
        raise ConfigError(f"erw study needs a name: one of {', '.join(STUDIES)}")
    usage = "--out DIR [--SETTING VALUE ...]"
    text = "SiT, REPA and ERW on the built-in images. Studies: " + ", ".join(STUDIES)
    parser = Parser(f"erw study {name}", text, usage=usage)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study")
    parser.add_argument("--dry-run", action="store_true", help="print all settings, do nothing")
    if not named:
        parser.parse_args(["--help"])
    plan = study_plan(name)
    add_settings(parser, plan, leave=OWN)
    found = parser.read(args[1:])
    plan = changed(plan, found)
    if found.dry_run:
        for setting in settings(plan):
            if setting.name not in OWN:
                print(typed(setting))
        return
    print(run_study(plan, found.out))
