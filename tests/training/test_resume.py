"""A stop, however hard, changes no bit of a run; two processes give what one does, and so do
micro-batches."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from erw.dist import computing_with
from erw.training.checkpoint import paths
from helpers.tiny import as_dit, tiny_run, with_loss, with_methods, with_term
from helpers.training import (
    InterruptAfter,
    assert_close,
    assert_same_run,
    go,
    last,
    logged,
    program,
    trainer,
    two_ranks,
)


def test_killed_in_either_phase_and_in_a_checkpoint_it_ends_with_the_same_bits(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    """Real SIGKILLs: in warm-up, in full training, and between writing a checkpoint and its
    renaming."""
    out = tmp_path / "run"
    for how in (["--die-after", 3], ["--die-in-checkpoint", 1], ["--die-after", 10]):
        assert program(cache, out, *how).poll() == -signal.SIGKILL
    done = program(cache, out)
    assert done.poll() == 0, done.err
    assert_same_run(straight, out)


def test_with_a_class_token_a_stop_changes_nothing(cache: Path, tmp_path: Path) -> None:
    run = with_loss(tiny_run(cache), "reg")
    go(run, tmp_path / "straight")

    with pytest.raises(KeyboardInterrupt):
        go(run, tmp_path / "stopped", progress=InterruptAfter(7))
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("dit", [False, True], ids=["flow", "ddpm"])
@pytest.mark.parametrize("stop", [2, 4, 5, 9])  # within warm-up, at the boundary, after it
def test_ctrl_c_saves_and_the_same_command_goes_on(
    cache: Path, straight: Path, straight_dit: Path, tmp_path: Path, stop: int, dit: bool
) -> None:
    run = as_dit(tiny_run(cache)) if dit else tiny_run(cache)

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop}"):
        go(run, out, progress=InterruptAfter(stop))
    assert paths(out / "checkpoints")[-1].name == f"step-{stop:08d}.safetensors"
    go(run, out)
    assert_same_run(straight_dit if dit else straight, out)


def test_a_failed_evaluation_is_made_up_for(cache: Path, straight: Path, tmp_path: Path) -> None:
    seen = []

    def fails(step: int, model: object, world: object) -> None:
        raise RuntimeError("the evaluator broke")

    with pytest.raises(RuntimeError, match="broke"):
        go(tiny_run(cache), tmp_path / "run", at={6}, evaluate=fails)
    go(
        tiny_run(cache),
        tmp_path / "run",
        at={6, 9},
        evaluate=lambda s, m, w: seen.append((s, m.step)),
    )
    assert seen == [(6, 6), (9, 9)]
    assert_same_run(straight, tmp_path / "run")


def test_metrics_have_every_line_once_in_order(straight: Path) -> None:
    assert [line["step"] for line in logged(straight)] == [4, 8, 12]
    assert [line["phase"] for line in logged(straight)] == ["warmup", "full", "full"]


def test_no_metrics_line_spans_the_boundary(cache: Path, tmp_path: Path) -> None:
    run = tiny_run(cache, steps=8)
    go(run.replace(plan=dataclasses.replace(run.plan, warmup=3)), tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert [(line["step"], line["phase"]) for line in lines] == [
        (3, "warmup"),
        (4, "full"),
        (8, "full"),
    ]
    assert [list(line["losses"]) for line in lines] == [["align"], *2 * [["flow", "align"]]]
    assert lines[0]["weights"] == {"align": 1.0} and lines[1]["weights"]["flow"] == 1.0


# -- many processes, micro-batches
# --------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cosine", "nt_xent"])
def test_micro_batches_are_the_batch(cache: Path, tmp_path: Path, loss: str) -> None:
    run = tiny_run(cache)
    run = with_term(run, loss=loss)
    split = run.replace(optim=dataclasses.replace(run.optim, accumulate=4))
    go(run, tmp_path / "one")
    go(split, tmp_path / "four")
    assert_close(last(tmp_path / "one"), last(tmp_path / "four"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_threads_change_no_bit(cache: Path, tmp_path: Path, precision: Any) -> None:
    run = with_methods(tiny_run(cache))
    run = run.replace(optim=dataclasses.replace(run.optim, accumulate=4, precision=precision))
    for count in (1, 2, 3):
        with computing_with(count):
            go(run, tmp_path / str(count))
            assert torch.get_num_threads() == count
    alone, threaded = trainer(run, tmp_path), trainer(run, tmp_path)
    phase = run.phase(5)
    alone.enter(phase)
    threaded.enter(phase)
    one = alone.step(5, phase, alone.read(5))
    with threaded.threaded():
        assert threaded.threads
        many = threaded.step(5, phase, threaded.read(5))
    assert many == one
    for p, q in zip(alone.net.parameters(), threaded.net.parameters(), strict=True):
        assert torch.equal(p, q)
    for count in (2, 3):
        assert_same_run(tmp_path / "1", tmp_path / str(count))


@pytest.mark.parametrize(
    ("dit", "loss"),
    [(True, "cosine"), (False, "nt_xent"), (False, "reg")],
    ids=["ddpm, cosine", "flow, nt_xent", "flow, class token"],
)
def test_two_processes_are_one_with_the_same_batch(
    cache: Path, tmp_path: Path, dit: bool, loss: str
) -> None:
    """Gloo ranks with half the batch each; NT-Xent's negatives are those of both."""
    one, two = tmp_path / "one", tmp_path / "two"
    run = as_dit(tiny_run(cache)) if dit else tiny_run(cache)
    go(with_loss(run, loss), one)
    two_ranks(cache, two, "--loss", loss, *["--dit"] * dit, torchrun=dit)
    assert_close(last(one), last(two))
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
