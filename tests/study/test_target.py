"""Cost to a target and speed-ups: log-linear, over seeds, from studies and from runs."""

import json
import math
import shutil
from pathlib import Path

import pytest

from erw.cli import main
from erw.cli.train import together, watches
from erw.config import Eval
from erw.errors import DataError
from erw.log import Silent, read_metrics
from erw.study.target import Track, compared, mean_of, reached, speed_up, told
from erw.study.tracks import tracks_of
from erw.training import train
from helpers.synthetic_study import synthetic, write_study
from helpers.tiny import tiny_cache, tiny_run

COSTS = (10.0, 20.0, 40.0, 80.0)


def track(method: str, seed: int, *, start: float, slope: float = 30.0) -> Track:
    """A score that falls linearly in log(cost)."""
    scores = tuple(start - slope * math.log(cost) for cost in COSTS)
    return Track(method, seed, (1, 2, 4, 8), COSTS, scores)


def test_the_cost_of_a_line_is_exact_and_its_interval_holds_the_seeds() -> None:
    lines = [track("a", seed, start=400.0 + seed) for seed in (-3, 0, 3)]
    target = 400 - 30 * math.log(31.7)
    found = reached(lines, target, metric="fd_lite2")
    assert found.cost == pytest.approx(31.7) and found.reached_by == found.seeds == 3
    assert found.low and found.high and found.low < 31.7 < found.high
    ends = (31.7 * math.exp(-3 / 30), 31.7 * math.exp(3 / 30))
    assert (found.low, found.high) == pytest.approx(ends)  # few seeds: their extremes
    alone = reached(lines[1:2], target, metric="fd_lite2")
    assert alone.low is alone.high is None and alone.cost == pytest.approx(31.7)


def test_not_reached_is_an_answer() -> None:
    lines = [track("a", seed, start=400.0 + 9 * seed) for seed in (0, 1, 2)]
    found = reached(lines, 400 - 30 * math.log(78), metric="fd_lite2")
    assert found.cost is None and found.reached_by == 1 and found.high is None
    assert found.low is not None  # a bootstrap of the luckiest seed alone gets there
    assert found.spent == 80 and found.best == pytest.approx(409 - 30 * math.log(80))
    record = compared(lines, metric="fd_lite2", over="steps", target=0.0)
    assert any("not reached in 80 steps" in line for line in told(record))


def test_higher_is_better_where_it_is() -> None:
    line = track("a", 0, start=400.0)
    up = line._replace(scores=tuple(-score for score in line.scores))
    found = reached([up], -(400 - 30 * math.log(31.7)), metric="inception_score")
    assert found.cost == pytest.approx(31.7) and not found.bound


def test_speed_up_of_lines_is_exact() -> None:
    ours, theirs = [track("a", 0, start=370.0)], [track("b", 0, start=400.0)]
    found = speed_up(ours, theirs, metric="fid")
    assert found.ratio == pytest.approx(math.exp(-1)) and found.seeds == (1, 1)
    assert speed_up(theirs, ours, metric="fid").ratio is None
    many = [track("a", seed, start=370.0 + seed) for seed in range(3)]
    spread = speed_up(many, theirs, metric="fid")
    assert spread.low and spread.ratio and spread.high
    assert spread.low < spread.ratio < spread.high


def test_means_are_of_the_steps_that_all_have() -> None:
    one, two = track("a", 0, start=400.0), track("a", 1, start=410.0)
    short = two._replace(steps=(2, 8), costs=(20.0, 80.0), scores=(9.0, 5.0))
    mean = mean_of([one, short])
    assert mean.costs == [20, 80] and mean.scores[1] == pytest.approx((one.scores[3] + 5) / 2)
    with pytest.raises(DataError, match="no step is scored"):
        mean_of([one, two._replace(steps=(3, 5, 6, 7))])


def test_a_study_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study", synthetic(seeds=3))
    stem = tmp_path / "plots" / "target"
    asked = ["cost", "--to-target", str(study), "--target", "200", "--out", str(stem)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "linear in log(cost)" in said and "ERW to SiT's" in said
    record = json.loads(stem.with_suffix(".json").read_text())
    assert len(record["reached"]) == 3 and len(record["speed_ups"]) == 6
    assert stem.with_name("target-dark.svg").stat().st_size > 1000
    assert main(["cost", "--to-target", str(study), "--metric", "fid"]) == 2
    assert "has the score fd_lite2" in capsys.readouterr().err
    assert main(["cost", "--to-target", str(tmp_path / "nowhere")]) == 2


def test_runs_scored_while_training_are_seeds_of_a_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tiny_cache(tmp_path / "cache").path
    run = tiny_run(cache, eval=Eval(every=4, samples=8, reference_count=16))
    folders = [str(tmp_path / f"run-{i}") for i in range(3)]
    watched = together(watches(run, folders[0], say=lambda _: None))
    train(run, folders[0], reporter=Silent(), **watched)
    for folder, (group, name, value) in zip(
        folders[1:], ((None, "seed", 1), ("optim", "lr", 0.5)), strict=True
    ):
        shutil.copytree(folders[0], folder)
        recipe = json.loads((Path(folder) / "recipe.json").read_text())
        resolved = recipe["resolved"]
        (resolved[group] if group else resolved)[name] = value
        (Path(folder) / "recipe.json").write_text(json.dumps(recipe))
    pair = tracks_of(folders[:2], metric="fd_lite2")
    assert [(t.method, t.seed) for t in pair] == [("debug", 0), ("debug", 1)]
    lines = [x for x in read_metrics(Path(folders[0]) / "metrics.jsonl") if x["kind"] == "eval"]
    assert pair[0].steps == (8, 12) and pair[0].costs == tuple(x["flops_total"] for x in lines)
    (epochs,) = tracks_of(folders[:1], metric="fd_lite2", over="epochs")
    assert epochs.costs == tuple(x["images"] / 48 for x in lines)
    three = tracks_of(folders, metric="fd_lite2")
    assert [t.method for t in three] == ["run-0", "run-0", "run-2"]
    metrics = str(Path(folders[0]) / "metrics.jsonl")
    assert main(["cost", "--to-target", metrics, folders[1], "--over", "epochs"]) == 0
    assert main(["cost", "--to-target", folders[0], "--metric", "fid"]) == 2
    assert "has no score fid; it has fd_lite2" in capsys.readouterr().err
