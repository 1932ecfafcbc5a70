"""The study: equal FLOPs, the comparison's arithmetic, and a small study from end to end."""

import dataclasses
import json
import math
import subprocess
import sys
import threading

import pytest

from erw.config import Run
from erw.errors import CheckpointError, ConfigError
from erw.models.cost import StepCost
from erw.plan import REPA, SIT, Plan, constant, stop_at
from erw.study import budget, compare, presets, progress, sizing
from erw.study.presets import STUDIES, StudyPlan, study_plan
from erw.study.results import ROW_KEYS, read_results
from erw.training.ledger import Ledger
from helpers.synthetic_study import BUDGET, SCORES, synthetic, write_study

COST = StepCost(warmup=200, full=1000, projector=90, teacher=260)

# -- cost to target -----------------------------------------------------------------------------


def test_cost_to_target_of_a_line_in_log_cost_is_exact():
    def score(cost):
        return 400 - 30 * math.log(cost)

    costs = [10.0, 20.0, 40.0, 80.0]
    for true in (10.0, 13.0, 31.7, 80.0):
        found = compare.cost_to_target(costs, [score(c) for c in costs], score(true))
        assert found.cost == pytest.approx(true) and not found.bound


def test_cost_to_target_takes_the_first_crossing_and_says_what_it_cannot_know():
    assert compare.cost_to_target([1, 2, 4], [9, 8, 7], 6) is None
    assert compare.cost_to_target([1, 2, 4], [9, 8, 7], 10) == compare.Reach(1, bound=True)
    bumpy = compare.cost_to_target([1, 2, 4, 8], [9, 5, 7, 4], 6)
    assert 1 < bumpy.cost < 2


@pytest.mark.parametrize(
    ("costs", "scores"), [([], []), ([1, 2], [3]), ([2, 1], [3, 2]), ([0, 1], [3, 2])]
)
def test_cost_to_target_refuses_points_without_order(costs, scores):
    with pytest.raises(ValueError, match="cost"):
        compare.cost_to_target(costs, scores, 1.0)


def test_saving_of_power_laws():
    """Scores a (4 c)^-p at fractions c: ERW's cost for SiT's final score has a closed form."""
    item = compare.saving(synthetic(points=64), "erw", "sit")
    (scale, power), target = SCORES["erw"], SCORES["sit"][0] * 4 ** -SCORES["sit"][1]
    assert item.ratio == pytest.approx((target / scale) ** (-1 / power) / 4, rel=1e-3)
    assert item.apart is None and not item.at_most


def test_spread_is_over_all_pairs_of_seeds():
    results = synthetic(seeds=3)
    item = compare.saving(results, "erw", "sit")
    assert item.low < item.ratio < item.high and item.apart
    back = compare.saving(results, "sit", "erw")
    assert back.ratio is None and back.high is None
    assert "does not reach" in compare.describe(back)
    assert "Every seed of ERW ends better than every seed of SiT" in compare.describe(back)


def test_overlapping_seeds_are_said_to_overlap():
    results = synthetic(seeds=3)
    rows = tuple(r._replace(fd_lite2=200.0 + r.seed - (r.fraction or 0)) for r in results.rows)
    same = dataclasses.replace(results, rows=rows)
    item = compare.saving(same, "erw", "repa")
    assert item.apart is False
    assert "not told apart" in compare.describe(item)


def test_one_seed_is_said_to_be_one():
    assert any("One seed" in s for s in compare.verdict(synthetic()).sentences)
    assert not any("One seed" in s for s in compare.verdict(synthetic(seeds=2)).sentences)


def test_other_methods_are_compared_with_the_first():
    results = synthetic()
    renamed = tuple(
        r._replace(method={"sit": "sit", "repa": "repa_stopped", "erw": "mine"}[r.method])
        for r in results.rows
    )
    said = " ".join(compare.verdict(dataclasses.replace(results, rows=renamed)).sentences)
    assert "REPA, stopped reaches SiT’s" in said and "mine reaches SiT’s" in said


def test_an_unfinished_study_does_not_compare_what_is_not_there():
    results = synthetic(seeds=2)
    study = {"methods": [[m, m] for m in results.methods], "seeds": [0, 1]}
    some = dataclasses.replace(results, settings={"study": study})

    def without(gone):
        return dataclasses.replace(some, rows=tuple(r for r in some.rows if not gone(r)))

    said = compare.verdict(without(lambda r: r.method == "erw"))
    assert "REPA" in said.title and "Still under way: ERW" in said.sentences[-1]
    said = compare.verdict(without(lambda r: r.method != "sit" and r.fraction == 1))
    assert said.title == "The study is under way" and "REPA, ERW" in said.sentences[-1]
    said = compare.verdict(without(lambda r: r.method == "erw" and r.seed == 1))
    assert "Still under way: ERW" in said.sentences[-1]
    assert compare.finished(some) == (["sit", "repa", "erw"], [])


# -- equal FLOPs --------------------------------------------------------------------------------

PLANS = {
    "sit": SIT,
    "repa": REPA,
    "erw": Plan(warmup=50, depth=2, align=constant(1.0), align_depth=3),
    "erw stops": Plan(warmup=20, depth=1, align=stop_at(1.0, over=30), align_depth=3),
    "erw batch": Plan(warmup=30, depth=2, align=constant(1.0), align_depth=3, warmup_batch=32),
}


@pytest.mark.parametrize("name", PLANS)
def test_parts_of_the_ledger_add_up(name):
    ledger = Ledger(PLANS[name], batch_size=8, cost=COST, rows=500)
    for steps in (1, 19, 20, 31, 50, 51, 200):
        assert sum(budget.parts(ledger, steps).values()) == ledger.spent(steps).total


@pytest.mark.parametrize("name", PLANS)
def test_every_point_is_within_a_step_of_its_share(name, monkeypatch):
    ledger = Ledger(PLANS[name], batch_size=8, cost=COST, rows=500)
    monkeypatch.setattr(budget, "ledger_of", lambda run, cache: ledger)
    total = Ledger(SIT, batch_size=8, cost=COST, rows=500).spent(200).total
    share = budget.share(Run(plan=PLANS[name]), None, budget=total, fractions=(0.25, 0.5, 1.0))
    for fraction, point in zip((0.25, 0.5, 1.0), share.points, strict=True):
        assert ledger.spent(point).total <= fraction * total < ledger.spent(point + 1).total
    assert share.run.steps == share.points[-1]


def test_a_budget_that_ends_in_warm_up_is_refused(monkeypatch):
    plan = PLANS["erw"]
    ledger = Ledger(plan, batch_size=8, cost=COST, rows=500)
    monkeypatch.setattr(budget, "ledger_of", lambda run, cache: ledger)
    with pytest.raises(ConfigError, match="within its warm-up"):
        budget.share(Run(plan=plan), None, budget=ledger.spent(40).total, fractions=(0.5, 1.0))
    with pytest.raises(ConfigError, match="different steps"):
        budget.share(Run(plan=plan), None, budget=ledger.spent(2).total, fractions=(0.2, 0.3, 1.0))


# -- plans and progress -------------------------------------------------------------------------


def test_studies_have_names_and_refuse_the_impossible():
    assert study_plan("demo").name == "demo"
    with pytest.raises(ConfigError, match="did you mean smoke"):
        study_plan("smok")
    with pytest.raises(ConfigError, match="either steps or hours"):
        StudyPlan(name="x", steps=None)
    with pytest.raises(ConfigError, match="must rise"):
        StudyPlan(name="x", fractions=(0.5, 0.25, 1.0))
    assert {len(plan.seeds) for plan in STUDIES.values()} == {1, 3}


def test_time_left_goes_to_nothing_and_learns():
    work = progress.Work({"a": 100, "b": 10}, expected={"a": 1.0, "b": 5.0})
    assert work.left() == pytest.approx(150)
    for _ in range(100):
        work.add("a", 1, seconds=2.0)
    assert 70 < work.left() < 105, "b is taken to be as slow as a was"
    work.skip("b", 10)
    assert work.left() == 0


def test_a_folder_holds_one_study(tmp_path):
    sizing.claim(presets.SMOKE, tmp_path)
    sizing.claim(presets.SMOKE, tmp_path)
    with pytest.raises(CheckpointError, match="another study: samples is 64 there and 65 here"):
        sizing.claim(dataclasses.replace(presets.SMOKE, samples=65), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files"):
        sizing.claim(presets.SMOKE, tmp_path / "other")


def test_results_have_the_rows_that_were_agreed(tmp_path):
    folder = write_study(tmp_path, synthetic(seeds=2))
    content = json.loads((folder / "results.json").read_text())
    assert len(content["rows"]) == 3 * 2 * 4
    for row in content["rows"]:
        assert set(ROW_KEYS) <= set(row)
        assert row["flops_total"] <= BUDGET


# -- from images to the report ------------------------------------------------------------------

TINY = dataclasses.replace(
    presets.SMOKE,
    name="tiny",
    steps=16,
    train_images=16,
    reference_images=16,
    samples=16,
    sample_steps=2,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A whole study, stopped once in the middle and gone on with."""
    from erw.study import demo

    out = tmp_path_factory.mktemp("demo")
    whole = demo.point.scored
    calls = []

    def stop_at_the_fourth(*args, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*args, **settings)

    demo.point.scored = stop_at_the_fourth
    try:
        with pytest.raises(KeyboardInterrupt):
            demo.run_study(TINY, out)
        before = {p: p.stat().st_mtime_ns for p in out.glob("points/*.json")}
        demo.run_study(TINY, out)
    finally:
        demo.point.scored = whole
    assert len(before) == 3
    assert all(p.stat().st_mtime_ns == time for p, time in before.items()), "done is done"
    return out


def test_a_study_ends_with_rows_at_equal_flops(study):
    results = read_results(study)
    assert results.methods == ("sit", "repa", "erw")
    assert len(results.rows) == 3 * len(TINY.fractions)
    total = results.settings["study"]["budget_flops"]
    for method in results.methods:
        *_, last = results.of(method, 0)
        entry = results.ledger[method]
        step = sum(entry["per_image"][part] for part in ("full", "projector", "teacher"))
        assert total - entry["batch"]["full"] * step < last.flops_total <= total
        assert entry["flops_total"] == last.flops_total == sum(entry["total"].values())
        assert last.images == entry["images"] and last.seconds > 0
        assert math.isfinite(last.fd_lite2) and last.fd_lite2 > results.floors["train_images"]
    sit, repa, erw = (results.of(method, 0)[-1] for method in results.methods)
    assert sit.align is None and sit.flops_teacher == 0 == sit.flops_warmup == repa.flops_warmup
    assert repa.align is not None and repa.flops_teacher > 0
    assert erw.flops_warmup > 0 and erw.step > repa.step, "a warm-up step is cheaper"


def test_a_finished_study_does_nothing_again_but_the_page(study):
    from erw.study import demo

    kept = [*study.glob("points/*"), *study.glob("grids/*"), *study.glob("runs/*/ema.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    rows = read_results(study).rows
    assert demo.run_study(TINY, study) == study / "report.html"
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert read_results(study).rows == rows
    assert (study / "report.html").read_text().count("<img") == len(rows) + 2


def test_two_processes_share_a_study_and_score_as_one(study, tmp_path):
    kept = ("train_images", "reference_images", "samples", "sample_steps", "steps")
    settings = [t for k in kept for t in (f"--{k.replace('_', '-')}", str(getattr(TINY, k)))]
    two = tmp_path / "two"
    argv = [sys.executable, "-m", "erw", "study", "smoke", "--out", str(two), *settings]
    both = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = {(r.method, r.fraction): r.fd_lite2 for r in read_results(study).rows}
    shared = {(r.method, r.fraction): r.fd_lite2 for r in read_results(two).rows}
    assert shared == pytest.approx(rows, rel=1e-3)
    scores = [line for text in said for line in text.splitlines() if "FD-Lite2" in line]
    assert len(scores) == len(rows), "each run was made by one of them"
    assert all("FD-Lite2" in text for text in said), "both had their share"


def test_a_study_sized_by_hours_keeps_its_steps(study, tmp_path, monkeypatch):
    from erw.study import demo

    plan = dataclasses.replace(TINY, steps=None, hours=3.0, methods=presets.METHODS[:1])
    sizes = iter([TINY.steps, 99])
    monkeypatch.setattr(sizing, "_fitting", lambda *_, **__: next(sizes))
    for _ in range(2):
        demo.run_study(plan, tmp_path / "out")
        rows = read_results(tmp_path / "out").rows
        assert [row.step for row in rows] == [8, 16]
    alone = [row.fd_lite2 for row in read_results(study).of("sit", 0)]
    assert [row.fd_lite2 for row in rows] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"steps": None, "hours": math.nan},
        {"seeds": ()},
        {"seeds": (1, 1)},
        {"solver": "ddpm"},
        {"solver": "bogus"},
        {"guidance": math.nan},
    ],
)
def test_impossible_studies_are_refused_before_they_begin(setting):
    with pytest.raises(ConfigError):
        dataclasses.replace(TINY, **setting)


def test_a_run_whose_process_dies_is_gone_on_with(study, capsys):
    from erw.study import demo
    from erw.training.run_dir import locked

    point = study / "points" / "sit-0-00000016.json"
    kept = json.loads(point.read_text())
    point.unlink()
    other = locked(study / "runs" / "sit-0")
    other.__enter__()
    dies = threading.Timer(3.0, other.__exit__, (None, None, None))
    dies.start()
    demo.run_study(TINY, study)
    assert not dies.is_alive(), "it waited"
    said = capsys.readouterr().err
    assert (
        "sit-0  left to the process" in said and "waiting for the process that is at sit-0" in said
    )
    assert json.loads(point.read_text())["fd_lite2"] == kept["fd_lite2"], "and scored it itself"
    assert len(read_results(study).rows) == 3 * len(TINY.fractions)
