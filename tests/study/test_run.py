"""A study: equal FLOPs, and a small one from images to the page."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from erw.config import Run
from erw.errors import CheckpointError, ConfigError
from erw.plan import REPA, SIT, Align, Plan, constant, stop_at
from erw.study import run as module
from erw.study.results import by_method, read_runs
from erw.study.run import claim, run_study, shares
from erw.study.studies import STUDIES, Study, study_plan
from erw.training.flops import Ledger, Rate

ALIGN = (Align(block=3, weight=constant(1.0)),)
PLANS = {
    "sit": SIT,
    "repa": REPA,
    "erw": Plan(warmup=50, depth=2, align=ALIGN),
    "erw stops": Plan(warmup=20, depth=1, align=(Align(block=3, weight=stop_at(1.0, over=30)),)),
    "erw batch": Plan(warmup=30, depth=2, align=ALIGN, warmup_batch=32),
}


def ledger(plan: Plan) -> Ledger:
    rates = tuple(
        Rate(a, b, phase.warmup, (200 if phase.warmup else 1000) + 90 * bool(phase.terms),
             phase.reads_encoder)
        for a, b in plan.segments(10_000)
        for phase in [plan(a)]
    )  # fmt: skip
    return Ledger(plan, 8, rates, teacher=260, rows=500)


@pytest.mark.parametrize("name", PLANS)
def test_every_point_is_within_a_step_of_its_share(name: str) -> None:
    total, costs = ledger(SIT).spent(200).total, ledger(PLANS[name])
    for i, point in enumerate(shares(costs, total, 3, name), start=1):
        assert costs.spent(point).total <= total * i / 3 < costs.spent(point + 1).total


def test_a_budget_that_ends_in_warm_up_is_refused() -> None:
    erw, sit = ledger(PLANS["erw"]), ledger(SIT)
    with pytest.raises(ConfigError, match="after its warm-up of 50; give more steps"):
        shares(erw, erw.spent(40).total, 2, "erw")
    with pytest.raises(ConfigError, match="not 3 different steps"):
        shares(sit, sit.spent(2).total, 3, "sit")


def test_studies_have_names() -> None:
    assert study_plan("demo").name == "demo"
    with pytest.raises(ConfigError, match="did you mean smoke"):
        study_plan("smok")
    assert {len(study.seeds) for study in STUDIES.values()} == {1, 3}


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"points": 0},
        {"samples": 1},
        {"seeds": ()},
        {"seeds": (1, 1)},
    ],
)
def test_impossible_studies_are_refused_before_they_begin(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        run_study(dataclasses.replace(STUDIES["smoke"], **setting), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_one_study(tmp_path: Path) -> None:
    smoke = STUDIES["smoke"]
    claim(smoke, tmp_path)
    claim(smoke, tmp_path)
    with pytest.raises(CheckpointError, match="another study: samples is 64 there and 65 here"):
        claim(dataclasses.replace(smoke, samples=65), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds thesis.txt and no study of this version"):
        claim(smoke, tmp_path / "other")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "study.json").write_text('{"name": "demo", "steps": 900}')
    with pytest.raises(CheckpointError, match=r"study.json and no study .*choose another --out"):
        claim(smoke, tmp_path / "old")


TINY = dataclasses.replace(
    STUDIES["smoke"], steps=16, train_images=16, reference_images=16, samples=16
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study, stopped once in the middle and gone on with."""
    out = tmp_path_factory.mktemp("studies") / "tiny"
    whole = module.scoring

    def stop_at_repa(run: Run, folder: Path, **options: Any) -> Any:
        if run.name == "REPA":
            raise KeyboardInterrupt
        return whole(run, folder, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "scoring", stop_at_repa)
        run_study(TINY, out)
    assert (out / "report.html").is_file(), "there is a page after every run"
    run_study(TINY, out)
    return out


def test_a_study_ends_with_scores_at_equal_flops(study: Path) -> None:
    groups = by_method(read_runs([study]))
    assert list(groups) == ["SiT", "REPA", "ERW"]
    (sit,), (repa,), (erw,) = groups.values()
    total = sit.last["flops_total"]
    for run in (sit, repa, erw):
        curve = run.curve("values", "fd_lite2")
        assert len(curve.values) == TINY.points and all(map(math.isfinite, curve.values))
        assert 0.9 * total < run.last["flops_total"] <= total and run.finished
    assert "align" not in sit.last["losses"] and repa.last["losses"]["align"] < 0
    assert sit.last["flops_teacher"] == 0 < repa.last["flops_teacher"]
    assert repa.last["flops_warmup"] == 0 < erw.last["flops_warmup"]
    assert erw.last["step"] > repa.last["step"], "a warm-up step is cheaper"


def test_the_page_has_pictures_and_the_attribution(study: Path) -> None:
    text = (study / "report.html").read_text()
    assert text.count("data:image/png") == 3 * TINY.points + 1
    assert "OpenMoji" in text and "CC BY-SA 4.0" in text


def test_a_finished_study_does_nothing_again_but_the_page(study: Path) -> None:
    paths = [*study.glob("runs/*/metrics.jsonl"), *study.glob("runs/*/ema.safetensors")]
    drawn = [*study.glob("runs/*/previews/*.png")]
    before = {path: path.read_bytes() for path in paths}
    times = {path: path.stat().st_mtime_ns for path in drawn}
    assert run_study(TINY, study) == study / "report.html"
    assert {path: path.read_bytes() for path in paths} == before
    assert {path: path.stat().st_mtime_ns for path in drawn} == times and len(drawn) == 6
    assert json.loads((study / "study.json").read_text())["runs"] == ["sit-0", "repa-0", "erw-0"]


def test_a_method_is_an_ordinary_run() -> None:
    run = Study("x").run("ERW", seed=3, cache="c")
    assert (run.name, run.seed, run.data.cache) == ("ERW", 3, ("c",))
    assert run.sample.steps == 12 and run.eval.samples == 500
