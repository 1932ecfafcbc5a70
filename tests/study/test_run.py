"""Studies: equal FLOPs, shared warm-ups, kill and go on, numbers, verdicts, the page."""

import csv
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from erw.config import Eval, Run
from erw.data.cache import Cache
from erw.errors import CheckpointError, ConfigError, ErwError, Preempted
from erw.evaluation.images import reference_images
from erw.interop import starting_point
from erw.io import load_tensors, write_text
from erw.log import read_metrics
from erw.plan import SIT, Align, Plan, constant, half_life, repa, stop_at
from erw.recipes import recipe
from erw.study import rows as module
from erw.study import run as run_module
from erw.study.engines import Job, command, run_tasks, slurm, submit
from erw.study.outcome import Line, Number, cells, judge, lines_of, verdict
from erw.study.report import report
from erw.study.results import by_method, read_runs
from erw.study.rows import finished, tasks, warmup_of
from erw.study.run import better_half, claim, in_cache, record, run_study
from erw.study.studies import (
    STUDIES,
    Row,
    Study,
    folder_of,
    grid,
    settled,
    shares,
    study_plan,
    values_of,
    with_settings,
)  # fmt: skip
from erw.training import load, train
from erw.training.checkpoint import paths, step_of
from erw.training.flops import Ledger, Rate
from erw.training.network import resolve
from helpers.synthetic_study import ledger_of, train_line, write_run
from helpers.tiny import tiny_run
from helpers.training import assert_same_run

ALIGN = (Align(block=3, weight=constant(1.0)),)
PLANS = {
    "sit": SIT,
    "repa": repa(8),
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
    assert {len(study_plan(name).seeds) for name in STUDIES} <= {1, 3}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_study_is_a_value_in_both_settings(name: str, scale: str) -> None:
    study = study_plan(name, scale=scale)
    assert study.title and all(row.run or row.paper for row in study.rows)
    for task in tasks(settled(study, lambda run: ledger_of(run))).values():
        assert task.run.plan.warmup <= task.run.steps and task.run.model.depth >= 1
        assert set(task.watched) <= set(range(task.run.plan.warmup + 1, task.run.steps + 1))
        assert task.folder.startswith("warmups/") or task.watched[-1] == task.run.steps
        # Built-in held-out images have no class tokens.
        assert not (task.run.eval.loss and task.run.model.needs_token)


def test_the_small_setting_has_the_depths_and_steps_of_the_paper_in_proportion() -> None:
    full, small = (study_plan("table6", scale=scale) for scale in ("full", "small"))
    by = [{row.label: row.run for row in study.rows} for study in (full, small)]
    for label in ("3", "8", "12"):
        a, b = by[0][label], by[1][label]
        assert a and b and a.model.depth == 28
        ratio = b.model.depth / a.model.depth
        assert b.plan.depth == max(1, round(ratio * a.plan.depth)) and a.plan.depth == int(label)
        assert b.plan.warmup / b.steps == pytest.approx(a.plan.warmup / a.steps, abs=0.01)
        assert b.plan.align[0].loss == "nt_xent"
    assert by[0]["5"] == by[0]["5, 50K (v1)"], "one run is read after 50K and 100K steps"
    assert full.rows[1].at == 150_000 and full.rows[1].paper[0] == 13.3


@pytest.mark.parametrize(
    "setting",
    [{"rows": ()}, {"points": 0}, {"seeds": ()}, {"seeds": (1, 1)}, {"better": (("SiT", "ER"),)}],
)
def test_impossible_studies_are_refused_before_they_begin(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(study_plan("smoke"), **setting)


def test_a_grid_and_its_settings() -> None:
    depths = dict(map(values_of, ["plan.depth=1,2", "optim.lr=1e-3", 'data.features=["a","b"]']))
    assert depths == {"plan.depth": [1, 2], "optim.lr": [0.001], "data.features": [["a", "b"]]}
    rows = grid(recipe("debug"), depths)
    assert [row.label for row in rows] == [
        f"depth {d}, optim.lr 0.001, data.features ['a', 'b']" for d in (1, 2)
    ]
    assert rows[1].run and (rows[1].run.plan.depth, rows[1].run.optim.lr) == (2, 1e-3)
    assert rows[1].run.data.features == ("a", "b")
    more = with_settings(recipe("quickstart_layersync"), {"plan.align.1.phase": "warmup"})
    assert [term.name for term in more.plan.align] == ["align", "align1"], "one more term"
    with pytest.raises(ConfigError, match=r"no setting plan\.dept; did you mean plan\.depth"):
        with_settings(recipe("debug"), {"plan.dept": 3})
    with pytest.raises(ConfigError, match=r"plan\.depth is 'x'; expected int"):
        with_settings(recipe("debug"), {"plan.depth": "x"})
    with pytest.raises(ConfigError, match="no setting: expected NAME=VALUE"):
        values_of("plan.depth")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_goes_on_in_its_folder(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        claim(study_plan(name), tmp_path)


def test_a_folder_holds_one_study(tmp_path: Path) -> None:
    smoke = study_plan("smoke")
    claim(smoke, tmp_path)
    claim(replace(smoke, seeds=(0, 1), rows=(*smoke.rows, Row("quoted", paper=(1.0,)))), tmp_path)
    other = smoke.changed(lambda run: with_settings(run, {"eval.samples": 65}))
    with pytest.raises(CheckpointError, match=r"another study: run\.eval\.samples \(64, now 65\)"):
        claim(other, tmp_path)
    with pytest.raises(CheckpointError, match=r"another study: points \(2, now 3\)"):
        claim(replace(smoke, points=3), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds thesis.txt and no study of this version"):
        claim(smoke, tmp_path / "other")


SCORED = Eval(every=1, samples=8, reference_count=16, loss=1, loss_images=8, keep_best=False)


def tiny_study(cache: Path) -> Study:
    plans = {"SiT": SIT, "REPA": repa(2, 2.0), "ERW": tiny_run(cache).plan}
    wide = replace(tiny_run(cache).model, width=64)  # else the teacher alone costs the budget
    options: dict[str, Any] = {"steps": 40, "eval": SCORED, "model": wide}
    runs = {label: tiny_run(cache, plan=plan, **options) for label, plan in plans.items()}
    rows = tuple(Row(label, run) for label, run in runs.items())
    return Study("tiny", "Tiny study", rows=rows, equal=True, points=2, probed=24)


@pytest.fixture(scope="module")
def study(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study, stopped once in the middle and gone on with."""
    out, whole = tmp_path_factory.mktemp("studies") / "tiny", module.scoring

    def stop_at_repa(run: Run, folder: Path, **options: Any) -> Any:
        if run.name == "REPA":
            raise KeyboardInterrupt
        return whole(run, folder, **options)

    def page(paths: list[Path], *, out: Path) -> Path:  # the true one once, it takes its time
        write_text(out, f"after {len(list(out.parent.glob('runs/*')))} runs")
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "report", page)
        with pytest.raises(KeyboardInterrupt), patch.context() as second:
            second.setattr(module, "scoring", stop_at_repa)
            run_study(tiny_study(cache), out, jobs=1)
        assert (out / "report.html").read_text() == "after 1 runs", "a page after every run"
        run_study(tiny_study(cache), out, jobs=1)
    report([out], out=out / "report.html")
    return out


def test_a_study_ends_with_scores_at_equal_flops(study: Path) -> None:
    groups = by_method(read_runs([study]))
    assert list(groups) == ["SiT", "REPA", "ERW"]
    (sit,), (repa,), (erw,) = groups.values()
    total = sit.last["flops_total"]
    for run in (sit, repa, erw):
        curve = run.curve("values", "fd_lite2")
        assert len(curve.values) == 2 and all(map(math.isfinite, curve.values))
        assert 0.9 * total < run.last["flops_total"] <= total and run.finished
        assert len(run.curve("probes", "knn").values) == 2
    assert "align" not in sit.last["losses"] and repa.last["losses"]["align"] < 0
    assert sit.last["flops_teacher"] == 0 < repa.last["flops_teacher"]
    assert repa.last["flops_warmup"] == 0 < erw.last["flops_warmup"]
    assert erw.last["step"] > repa.last["step"], "a warm-up step is cheaper"


def test_the_numbers_of_the_table_are_those_of_its_runs(study: Path) -> None:
    with (study / "table.csv").open() as file:
        head, *table = csv.reader(file)
    assert head[1:5] == ["FD-Lite2", "held-out loss", "k-NN", "CKNNA"]
    for row in table:
        lines = read_metrics(study / "runs" / folder_of(row[0], 0) / "metrics.jsonl")
        last = {line["kind"]: line for line in lines}  # the last one of each kind
        ours = [last["eval"]["values"]["fd_lite2"], last["validation"]["flow"]]
        ours += [last["probe"]["probes"][name] for name in ("knn", "cknna")]
        assert row[1:5] == [f"{value:.4g}" for value in ours]
        assert abs(float(row[-1]) - last["eval"]["seconds"]) <= 1
        by_block = last["probe"]["by_block"]["cknna"]
        assert len(by_block) == 4 and max(by_block) == last["probe"]["probes"]["cknna"]
    text = (study / "table.md").read_text()
    head = "By FD-Lite2, one seed, up to 5% taken for chance: best is "
    assert text.startswith(f"# Tiny study\n\n{head}")
    assert (study / "table.tex").read_text().count(r" \\") == 4
    assert (study / "figure.svg").read_bytes().startswith(b"<?xml")


def test_the_page_has_pictures_the_table_and_the_attribution(study: Path) -> None:
    text = (study / "report.html").read_text()
    assert text.count("data:image/png") == 3 * 2
    assert "The table" in text and "held-out loss" in text


def test_a_finished_study_does_nothing_again_but_the_page(study: Path, cache: Path) -> None:
    paths = [*study.glob("runs/*/metrics.jsonl"), *study.glob("runs/*/ema.safetensors")]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "report", lambda paths, *, out: out)
        assert run_study(tiny_study(cache), study, jobs=1) == study / "report.html"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths} == before
    assert json.loads((study / "study.json").read_text())["runs"] == ["sit-0", "repa-0", "erw-0"]


# -- warm-ups in common ---------------------------------------------------------------------------


def test_a_shared_warm_up_gives_each_run_the_bits_of_its_own(cache: Path, tmp_path: Path) -> None:
    plan = Plan(warmup=4, depth=1, align=(Align(block=2, weight=constant(2.0)),))
    later = replace(plan.align[0], block=3, weight=half_life(1.0, over=4))
    plans = {
        "short": plan,
        "later": replace(plan, align=(later,), optimizer="fresh", projector="fresh"),
        "long": replace(plan, warmup=8),
        "deeper": replace(plan, depth=2),
    }
    rows = (Row(k, tiny_run(cache, plan=p, steps=p.warmup + 3)) for k, p in plans.items())
    study = Study("warm", "Warm", rows=tuple(rows), probed=0, points=1)
    found = tasks(study)
    warm = [name for name in found if name.startswith("warmup")]
    assert len(warm) == 1 and warm[0].endswith("-4"), "once, and on the way of the longer one"
    assert [found[f"{k}-0"].warmup for k in plans] == [*3 * warm, ""]
    record(study, tmp_path)
    for name, task in found.items():
        module.train_task(tmp_path, name)
        assert finished(task, tmp_path)
    for label in plans:
        task = found[f"{label}-0"]
        alone = train(task.run, tmp_path / "alone" / label).out
        together = tmp_path / task.folder
        for name in ("ema.safetensors", f"checkpoints/step-{task.run.steps:08d}.safetensors"):
            (a, _), (b, _) = load_tensors(alone / name), load_tensors(together / name)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
        lines = [read_metrics(folder / "metrics.jsonl") for folder in (alone, together)]
        a, b = ([{k: v for k, v in x.items() if k != "seconds"} for x in some] for some in lines)
        assert a == b


def test_what_a_warm_up_depends_on_keeps_it_apart() -> None:
    run = recipe("debug")
    term = run.plan.align[0]
    same = {"plan.projector": "fresh", "plan.align.0.block": 3, "steps": 20, "plan.warmup": 7}
    assert warmup_of(with_settings(run, same)) == warmup_of(run)
    for change in ({"seed": 1}, {"plan.depth": 2}, {"optim.lr": 1.0}, {"plan.warmup_lr": 2.0},
                   {"plan.align.0.loss": "nt_xent"}, {"data.batch_size": 4}):  # fmt: skip
        assert warmup_of(with_settings(run, change)) != warmup_of(run), change
    more = replace(run.plan, align=(term, replace(term, name="second", phase="full")))
    assert warmup_of(run.replace(plan=more)) != warmup_of(run), "another projector is drawn"


# -- numbers and verdicts -------------------------------------------------------------------------


def lines(**scores: tuple[float, ...]) -> list[Line]:
    run = recipe("debug")
    return [Line(Row(k, run), {"fd_lite2": Number(v)}, {}) for k, v in scores.items()]


def test_a_verdict_says_what_the_ranges_of_seeds_say() -> None:
    a, b, c = Number((3.0, 4.0)), Number((5.0, 6.0)), Number((3.5, 9.0))
    lower, higher = (
        partial(judge, higher=False, noise=0.05),
        partial(judge, higher=True, noise=0.05),
    )
    assert lower(a, b) == "agree" and lower(b, a) == "differ"
    assert higher(a, b) == "differ" and higher(b, a) == "agree"
    assert lower(a, c) == higher(c, b) == "not told apart"
    near = Number((100.0,)), Number((104.0,))
    assert lower(*near) == "not told apart" and partial(lower, noise=0.03)(*near) == "agree"
    some = lines(erw=a.values, repa=b.values, sit=c.values)
    rows = tuple(line.row for line in some)
    pairs = (("erw", "repa"), ("repa", "sit"), ("sit", "repa"))
    study = Study("x", "X", rows=rows, better=pairs)
    assert verdict(study, some) == (
        "By FD-Lite2, 2 seeds: agree: erw against repa (3.5, 5.5). not told apart: repa against "
        "sit (5.5, 6.25); sit against repa (6.25, 5.5). best is erw, not told apart from sit."
    )
    assert verdict(study, []) == "Nothing is scored yet."
    one = lines(erw=(7.0,), repa=(5.0,))
    assert verdict(replace(study, better=pairs[:1]), one).startswith(
        "By FD-Lite2, one seed, up to 5% taken for chance: differ: erw against repa (7, 5). best"
    )
    assert str(a) == "3.5 (3 to 4)" and str(Number((463.04,))) == "463"


def test_a_quoted_row_and_a_row_read_on_the_way(study: Path, cache: Path) -> None:
    plan = tiny_study(cache)
    known = json.loads((study / "study.json").read_text())["study"]["rows"][0]["run"]
    sit = with_settings(plan.rows[0].run, {"steps": known["steps"]})  # type: ignore[arg-type]
    first = read_runs([study / "runs" / "sit-0"])[0].curve("values", "fd_lite2")
    rows = (Row("SiT", sit), Row("half", sit, at=first.steps[0]), Row("DiT", paper=(9.62, 6.85)))
    found = lines_of(replace(plan, rows=rows), study)
    assert [x.scores["fd_lite2"].values for x in found[:2]] == [first.values[1:], first.values[:1]]
    assert found[0].costs["FLOPs"].mean == 2 * found[1].costs["FLOPs"].mean
    table = cells(found)
    assert table[0][:4] == ["", "paper FID", "paper sFID", "FD-Lite2"]
    assert table[3][:4] == ["DiT", "9.62", "6.85", ""]


def test_the_worse_half_drops_out(tmp_path: Path) -> None:
    run = recipe("debug")
    rows = tuple(Row(x, run.replace(steps=10 + i)) for i, x in enumerate("abcde"))
    for i, row in enumerate(rows):
        assert row.run
        values = {"fd_lite2": [5.0, 1.0, 4.0, 2.0, 3.0][i]}
        cost = train_line(row.run.steps, "SiT", 0)
        line = cost | {"kind": "eval", "values": values, "best": False, "how": {}}
        write_run(tmp_path / "runs" / folder_of(row.label, 0), row.label, [cost, line])
    study = Study("x", "X", rows=rows, equal=True, halvings=1)
    assert better_half(study, tmp_path, {*"abcde"}) == {*"bde"}
    assert better_half(replace(study, metric="fd_lite2"), tmp_path, {*"acd"}) == {*"cd"}


def test_a_row_begins_with_the_model_of_another(cache: Path, tmp_path: Path) -> None:
    """To the bit as `erw.train` from that model."""
    first, second = tiny_run(cache, steps=6), tiny_run(cache, plan=repa(2), steps=4)
    rows = Row("earlier", first), Row("later", second, start="earlier")
    study = Study("two", "Two", rows=rows, probed=0, points=1)
    run_study(study, tmp_path / "study", jobs=1)
    opened = Cache.open(cache)
    names = opened.class_names
    model = load(tmp_path / "study" / "runs" / "earlier-0")
    init = starting_point(model, resolve(second, opened), names, len(names))
    train(second.replace(name="later"), tmp_path / "alone", init=init)
    later = tmp_path / "study" / "runs" / "later-0"
    ours, theirs = (load_tensors(run / "ema.safetensors")[0] for run in (later, tmp_path / "alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_choice_of_groups_has_its_cache(tmp_path: Path) -> None:
    flags, run = ("flags",), recipe("quickstart_sit")
    rows = Row("all", run), Row("flags", run, groups=flags)
    study = Study("two", "Two", rows=rows, images=4)
    there = in_cache(study, tmp_path / "cache", tmp_path)
    caches = [Cache.open(row.run.data.cache) for row in there.rows if row.run]
    assert [len(one) for one in caches] == [4, 4] and caches[1].class_names == flags
    some = reference_images(None, flags, size=64, count=2)
    assert some.class_names == flags  # type: ignore[union-attr]


# -- engines --------------------------------------------------------------------------------------


def test_runs_in_parallel_processes_and_one_that_fails(cache: Path, tmp_path: Path) -> None:
    good = tiny_run(cache, plan=SIT, steps=2)
    bad = good.replace(data=replace(good.data, features=("nowhere",)), plan=repa(2))
    study = Study("two", "Two", rows=(Row("good", good), Row("bad", bad)), probed=0, points=1)
    record(study, tmp_path)
    with pytest.raises(
        ErwError, match=r"bad-0 failed \(error: .*nowhere.*same command tries again"
    ):
        from erw.study.engines import local

        run_tasks(tasks(study), tmp_path, local("two", tmp_path, {}), jobs=2)
    assert finished(tasks(study)["good-0"], tmp_path)
    assert command("two", tmp_path, "good-0", processes=4)[2:6] == [
        "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m",
    ]  # fmt: skip


def test_a_study_that_is_terminated_has_its_runs_save(cache: Path, tmp_path: Path) -> None:
    one = tiny_run(cache, plan=SIT)
    study = Study("two", "Two", rows=(Row("a", one), Row("b", one.replace(steps=6))), points=1)
    saved: list[str] = []

    def start(name: str, place: int) -> Job:
        return Job(lambda: None, lambda: saved.append(name))

    with pytest.raises(Preempted, match="the same command goes on"):
        terminate = partial(os.kill, os.getpid(), signal.SIGTERM)
        run_tasks(tasks(study), tmp_path, start, jobs=2, tick=lambda: terminate())
    assert saved == ["a-0", "b-0"]


def test_a_preempted_job_saves_and_goes_on(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning that Slurm sends, as submitit hears it; then the job that is queued again."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    tiny = Path(__file__).parents[1] / "helpers" / "tiny.py"
    words = [sys.executable, str(tiny), str(cache), "run", "--slow", "0.2"]
    first = submit(words, tmp_path / "logs", {"cluster": "local"})
    metrics, task = tmp_path / "run" / "metrics.jsonl", None
    while not (metrics.exists() and metrics.stat().st_size):
        assert not first.done(), first.exception()
        time.sleep(0.05)
    children = Path(f"/proc/{first.job_id}/task/{first.job_id}/children")
    task = int(children.read_text().split()[0])
    os.kill(task, signal.SIGUSR2)
    while not first.done() and Path(f"/proc/{task}").exists():
        time.sleep(0.05)
    made = paths(tmp_path / "run" / "checkpoints")
    assert made and step_of(made[-1]) < 12, "it has saved, and nothing runs on"
    again = submit(words[:-2], tmp_path / "logs", {"cluster": "local"})
    again.result()
    assert_same_run(straight, tmp_path / "run")


def test_a_run_as_a_job_of_submitit(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    study = Study("job", "Job", rows=(Row("one", tiny_run(cache, steps=6)),), probed=0, points=1)
    record(study, tmp_path)
    start = slurm("job", tmp_path, {"cluster": "local"})
    run_tasks(tasks(study), tmp_path, start, jobs=10)
    assert finished(tasks(study)["one-0"], tmp_path)
