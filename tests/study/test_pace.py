"""How long a study takes: what is left of it, and the steps that fit into some minutes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from erw.config import Run
from erw.errors import ConfigError
from erw.io import write_text
from erw.recipes import recipe
from erw.study import run as run_module
from erw.study.pace import Pace, fitted, left, with_first
from erw.study.rows import Task, tasks
from erw.study.studies import Study, settled, study_plan
from helpers.synthetic_study import ledger_of, train_line

DEMO = study_plan("demo")
PACES = {"SiT": Pace(0, 0.25, 20, 5), "REPA": Pace(0, 0.3, 20, 5), "ERW": Pace(0.1, 0.3, 20, 5)}


def equal(study: Study) -> Study:
    return settled(study, ledger_of)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_the_most_steps_that_fit(jobs: int) -> None:
    nowhere, seconds = Path("nowhere"), 900.0

    def lasts(steps: int) -> float:
        return left(tasks(equal(with_first(DEMO, steps))), nowhere, PACES, jobs)

    steps = fitted(DEMO, seconds, PACES, jobs, equal)
    assert lasts(steps) <= seconds < lasts(steps + steps // 90 + 1)
    rows = equal(with_first(DEMO, steps)).rows
    costs = [PACES[row.label].cost(row.run, row.run.steps, DEMO.points) for row in rows if row.run]
    most = {1: sum(costs), 2: max(costs[1], costs[0] + costs[2]), 3: max(costs)}[jobs]
    assert lasts(steps) == pytest.approx(most), "the third run begins where the first has ended"


def test_too_few_minutes_for_the_shortest_study() -> None:
    with pytest.raises(ConfigError, match=r"takes \d+\.\d minutes here at its shortest"):
        fitted(DEMO, 60.0, PACES, 2, equal)


def test_what_is_left_counts_what_the_metrics_have(tmp_path: Path) -> None:
    short = recipe("quickstart")
    short = short.replace(plan=replace(short.plan, warmup=20))
    run = short.replace(name="ERW", steps=100)
    task = Task(run, "runs/a", watched=(60, 100), kinds=("train", "eval"))
    other = task._replace(folder="runs/b")
    whole = 5 + 20 * 0.1 + 80 * 0.3 + 2 * 20
    assert left({"a": task}, tmp_path, PACES, 1) == pytest.approx(whole)
    lines = [json.dumps(train_line(step, "ERW", 0)) + "\n" for step in (10, 60)]
    write_text(tmp_path / "runs/a/metrics.jsonl", "".join(lines))
    assert left({"a": task}, tmp_path, PACES, 1) == pytest.approx(40 * 0.3 + 2 * 20)
    assert left({"a": task, "b": other}, tmp_path, PACES, 2) == pytest.approx(whole)
    shared = Task(run.replace(steps=20), "warmups/w")
    behind = {"w": shared, "b": other._replace(warmup="w")}
    assert left(behind, tmp_path, PACES, 1) == pytest.approx(whole + 5), "a process more"


def test_a_study_goes_on_with_the_steps_that_it_was_fitted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(study: Study, jobs: int) -> dict[Run, Pace]:
        monkeypatch.setattr(run_module, "timed", None)  # never again
        return {row.run: PACES[row.label] for row in study.rows if row.run}

    monkeypatch.setattr(run_module, "timed", once)
    starts = []
    for _ in range(2):
        run_module.claim(DEMO, tmp_path)
        starts.append(run_module.in_time(DEMO, tmp_path, time.monotonic(), 2, equal))
    assert starts[0] == starts[1] and starts[0][1] == PACES


@pytest.mark.parametrize("name", ["table2", "table4", "figure4", "figure5"])
def test_shared_warmups_take_what_those_of_their_rows_take(name: str) -> None:
    study = study_plan(name)
    paces = {row.label: Pace(0.1, 0.3) for row in study.rows}
    todo = tasks(study)
    assert any(not task.watched for task in todo.values()), "no warm-up is shared"
    alone = {key: task._replace(warmup="") for key, task in todo.items() if task.watched}
    assert 0 < left(todo, Path("nowhere"), paces, 1) < left(alone, Path("nowhere"), paces, 1)
