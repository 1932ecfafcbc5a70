"""docs/results.md says what the committed studies say, in its own numbers."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_results_is_what_the_studies_say() -> None:
    results = script()
    assert results.PAGE.read_text("utf-8") == results.page(), "run scripts/results.py"


def test_tables_come_from_the_runs_that_are_committed() -> None:
    """The numbers of a table, made anew from the runs' own lines."""
    from erw.config import from_dict
    from erw.study.outcome import cells, lines_of
    from erw.study.results import read_study
    from erw.study.studies import Study

    folders = sorted(script().RESULTS.glob("*/study.json"))
    assert folders
    for folder in (path.parent for path in folders):
        study = from_dict(Study, read_study(folder)["study"])
        with (folder / "table.csv").open() as file:
            assert cells(lines_of(study, folder)) == list(csv.reader(file)), folder.name
