"""Runs read as curves by name: grouping by method, costs, bins and clear errors."""

import json
from pathlib import Path

import pytest

from erw.errors import CheckpointError, ConfigError, DataError
from erw.study.results import Curve, binned, by_method, read_runs
from helpers.synthetic_study import STEPS, WARMUP, lines_of, score, write_run, write_study


def test_a_study_is_read_with_a_methods_seeds_together(tmp_path: Path) -> None:
    groups = by_method(read_runs([write_study(tmp_path, seeds=2)]))
    assert {name: [run.seed for run in runs] for name, runs in groups.items()} == {
        "SiT": [0, 1], "REPA": [0, 1], "ERW": [0, 1],
    }  # fmt: skip
    assert all(run.finished for runs in groups.values() for run in runs)


def test_runs_of_a_study_that_have_only_begun_are_left_out(tmp_path: Path) -> None:
    study = write_study(tmp_path, seeds=1)
    (next(study.glob("runs/*[Rr][Ee][Pp][Aa]*")) / "metrics.jsonl").write_text("")
    assert [run.method for run in read_runs([study])] == ["SiT", "ERW"]


def test_curves_are_found_by_name_over_every_cost(tmp_path: Path) -> None:
    run = read_runs([write_run(tmp_path / "r", "ERW", lines_of("ERW", 0))])[0]
    assert run.names("losses") == ["align", "flow"] and run.names("values") == ["fd_lite2"]
    flow = run.curve("losses", "flow", over="steps")
    assert flow.costs == flow.steps == tuple(range(WARMUP + 10, STEPS["ERW"] + 1, 10))
    scores = run.curve("values", "fd_lite2", over="epochs")
    assert scores.values[-1] == score("ERW", 1.0, 0)
    assert scores.costs[-1] == pytest.approx(64 * STEPS["ERW"] / 640)
    assert len(run.curve("validation", "flow").values) == 4
    assert run.curve("weights", "align").values[0] == 0.5
    assert run.curve("losses", "direction").costs == ()
    with pytest.raises(ConfigError, match="no cost 'watts'; choose one of flops"):
        run.curve("losses", "flow", over="watts")


def test_lines_of_an_older_version_have_losses_by_name(tmp_path: Path) -> None:
    lines = lines_of("ERW", 0)
    old = []
    for line in lines:
        if line["kind"] == "train":
            losses, weights = line.pop("losses"), line.pop("weights")
            line |= {name: losses.get(name, 0.0) for name in ("flow", "align")}
            line["align_weight"] = weights["align"]
        old.append(line)
    run = read_runs([write_run(tmp_path / "old", "ERW", old)])[0]
    new = read_runs([write_run(tmp_path / "new", "ERW", lines_of("ERW", 0))])[0]
    for name in ("flow", "align"):
        assert run.curve("losses", name) == new.curve("losses", name)


def test_runs_are_seeds_of_a_method_if_they_differ_in_nothing_else(tmp_path: Path) -> None:
    lines = lines_of("SiT", 0)
    folders = [
        write_run(tmp_path / "a", "debug", lines),
        write_run(tmp_path / "b", "debug", lines, seed=1),
        write_run(tmp_path / "c", "debug", lines, lr=0.5),
    ]
    assert [run.method for run in read_runs(folders[:2])] == ["debug", "debug"]
    assert [run.method for run in read_runs(folders)] == ["a", "a", "c"]
    twice = write_run(tmp_path / "d", "debug", lines)
    assert [run.method for run in read_runs([folders[0], twice])] == ["a", "d"]
    with pytest.raises(DataError, match="named twice"):
        read_runs([folders[0], folders[0]])


def test_bins_keep_the_phases_and_the_steps_weight() -> None:
    steps = (10, 20, 21, 31)
    pairs = binned(Curve((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 50.0, 3.0), steps), points=2)
    assert pairs.steps == (20, 31) and pairs.costs == (2.0, 4.0)
    assert pairs.values == pytest.approx(((10 + 20) / 20, (50 + 30) / 11))
    many = Curve(tuple(map(float, range(1, 1001))), (0.0,) * 1000, tuple(range(1, 1001)))
    bins = binned(many, points=50, warmup=5)
    assert len(bins.steps) <= 52 and bins.steps[0] == 5 and bins.steps[-1] == 1000


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in .*not the folder"):
        read_runs([tmp_path])
    run = write_run(tmp_path / "run", "SiT", lines_of("SiT", 0))
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no training line yet"):
        read_runs([run])
    (run / "metrics.jsonl").write_text('{"kind": "train"}\n{}\n')
    with pytest.raises(CheckpointError, match="line 1"):
        read_runs([run])
    (run / "recipe.json").unlink()
    with pytest.raises(CheckpointError, match=r"no recipe\.json"):
        read_runs([run])


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "SiT", lines_of("SiT", 0))
    whole = (run / "metrics.jsonl").read_text()
    last = json.loads(whole.splitlines()[-4])["step"]
    (run / "metrics.jsonl").write_text(whole[:-40])
    assert read_runs([run])[0].last["step"] >= last
