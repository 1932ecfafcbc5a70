"""Scores while training: they touch nothing, none is lost or told twice, and the best is kept."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erw.cli import main
from erw.cli.train import watching
from erw.config import Eval, Run
from erw.errors import CheckpointError, ConfigError
from erw.evaluation.callback import Callback, keep_if_best, together
from erw.evaluation.evaluate import Scores
from erw.evaluation.images import reference_images
from erw.log import read_metrics
from erw.sampling.preview import watched_steps
from erw.training import load
from erw.training.checkpoint import paths
from helpers.tiny import tiny_run
from helpers.training import go, program

SMALL = Eval(every=2, samples=8, reference_count=16, loss=2, loss_images=8)


def watched(run: Run, out: Path) -> Path:
    go(run, out, **watching(run, str(out), say=lambda text: None))
    return out


@pytest.fixture(scope="module")
def scored(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, 4 of them warm-up, scored and saved every 2."""
    run = tiny_run(cache, eval=SMALL)
    run = run.replace(log=dataclasses.replace(run.log, checkpoint=2, keep=9))
    return watched(run, tmp_path_factory.mktemp("during") / "run")


def lines(out: Path, kind: str) -> list[dict]:
    found = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == kind]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in found]


def test_scores_change_nothing_of_training(cache: Path, scored: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    go(tiny_run(cache), plain)
    for name in ("ema.safetensors", f"checkpoints/{paths(plain / 'checkpoints')[-1].name}"):
        a, b = load_file(plain / name), load_file(scored / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert lines(plain, "train") == lines(scored, "train")


def test_a_line_has_score_cost_and_how_it_was_made(scored: Path) -> None:
    found = lines(scored, "eval")
    assert [line["step"] for line in found] == [6, 8, 10, 12]  # none in warm-up
    costs = {line["step"]: line["flops_total"] for line in lines(scored, "train")}
    for line in found:
        assert line["values"]["fd_lite2"] > 0 and line["how"]["count"] == 8
        assert line["how"]["settings"]["ema"] == load(scored).run.optim.ema
        assert line["how"]["settings"]["step"] == line["step"]
        assert line["flops_total"] == costs.get(line["step"], line["flops_total"])
    assert len({line["values"]["fd_lite2"] for line in found}) > 1


def test_a_validation_line_has_cost_and_the_loss_by_time(scored: Path) -> None:
    found, scores = lines(scored, "validation"), lines(scored, "eval")
    assert [line["step"] for line in found] == [6, 8, 10, 12]  # none in warm-up
    for line, score in zip(found, scores, strict=True):
        assert line["flops_total"] == score["flops_total"] and line["images"] == score["images"]
        assert len(line["flow_by_time"]) == len(line["times"]) == 12
        assert line["flow"] == pytest.approx(sum(line["flow_by_time"]) / 12)
    assert found[-1]["flow"] < found[0]["flow"]  # the EMA model learns


def test_the_best_weights_are_kept(scored: Path) -> None:
    found = lines(scored, "eval")
    top = min(found, key=lambda line: line["values"]["fd_lite2"])["step"]
    assert [line["step"] for line in found if line["best"]][-1] == top
    best, same = load(scored, checkpoint="best"), load(scored, checkpoint=top)
    assert best.step == same.step == top and load(scored).step == 12
    for a, b in zip(best.net.parameters(), same.net.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="but last, best, 2, 4, 6, 8, 10, 12"):
        load(scored, checkpoint=7)


def test_killed_within_a_score_and_after_one_each_is_told_once(
    cache: Path, scored: Path, tmp_path: Path
) -> None:
    """Real SIGKILLs: between a score and its line, and later, with the line of the checkpoint that
    the run goes on from already there."""
    out = tmp_path / "run"
    for more in (["--die-in-score", 3], ["--die-after", 9], []):
        done = program(cache, out, "--eval-every", 2, *more)
        assert done.poll() == (-signal.SIGKILL if more else 0), done.err
    assert lines(out, "eval") == lines(scored, "eval")
    assert lines(out, "validation") == lines(scored, "validation")
    assert load(out, checkpoint="best").step == load(scored, checkpoint="best").step


def test_only_comparable_scores_decide_which_weights_are_best(scored: Path, tmp_path: Path) -> None:
    found = lines(scored, "eval")[0]
    scores = Scores(**{**found["how"], "values": {"fd_lite2": 5.0}})
    model, path = load(scored), tmp_path / "best.safetensors"
    assert keep_if_best(path, model, scores)
    other = dataclasses.replace(model, step=13)
    worse = dataclasses.replace(scores, values={"fd_lite2": 6.0})
    assert not keep_if_best(path, other, worse)
    assert keep_if_best(path, other, dataclasses.replace(worse, count=9))  # other samples
    recall = dataclasses.replace(scores, values={"recall": 0.1})
    for value, best in ((0.1, True), (0.2, True), (0.1, False)):  # higher is better
        other = dataclasses.replace(other, step=other.step + 1)
        assert (
            keep_if_best(
                tmp_path / "r", other, dataclasses.replace(recall, values={"recall": value})
            )
            == best
        )


def test_steps_and_several_callbacks() -> None:
    run = Run(steps=25, eval=Eval(every=10))
    assert watched_steps(run, run.eval.every) == (10, 20, 25) and watched_steps(run, 0) == ()
    seen: list[tuple[str, int]] = []
    two: list[tuple[set[int], Callback]] = [
        ({1, 2}, lambda s, *_: seen.append(("a", s))),
        ({2}, lambda s, *_: seen.append(("b", s))),
    ]
    options = together(two)
    assert options["at"] == {1, 2}
    for step in (1, 2):
        options["evaluate"](step, None, None)
    assert seen == [("a", 1), ("a", 2), ("b", 2)]


def test_from_the_command_line(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, small = tmp_path / "run", ["--eval.samples", "8", "--eval.reference-count", "16"]
    asked = ["train", "debug", "--out", str(run), "--data.cache", str(cache), "--model.patch", "8"]
    for wrong, word in (
        (["--eval.metric", "fs-lite2"], "did you mean fd-lite2"),
        (["--eval.reference", "nowhere"], "no reference at nowhere"),
        (["--eval.every", "-1"], "eval.every"),
    ):
        assert main([*asked, "--eval.every", "4", *small, *wrong]) == 2
        assert word in capsys.readouterr().err
    assert not run.exists()
    small += ["--eval.loss", "4", "--eval.loss-images", "8"]
    assert main([*asked, "--eval.every", "6", *small]) == 0
    said = capsys.readouterr().err
    assert "step 12: fd_lite2" in said and "step 12: validation loss" in said
    assert [line["step"] for line in lines(run, "validation")] == [8, 12]
    assert [line["step"] for line in lines(run, "eval")] == [6, 12]
    best = min(lines(run, "eval"), key=lambda line: line["values"]["fd_lite2"])["step"]
    out = tmp_path / "best"
    assert main(["sample", str(run), "--out", str(out), "--checkpoint", "best"]) == 0
    assert json.loads((out / "settings.json").read_text())["step"] == best
    assert main(["sample", str(run), "--out", str(out), "--checkpoint", "5"]) == 2
    assert "but last, best" in capsys.readouterr().err


def test_without_a_reference_it_says_so_before_training(cache: Path) -> None:
    with pytest.raises(ConfigError, match="reference"):
        reference_images(None, ("cat", "dog"), size=16, count=8)
