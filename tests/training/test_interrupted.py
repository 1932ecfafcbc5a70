"""Stops at the worst moment: between a checkpoint and what follows it, and files changed since."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erw.config import Optim
from erw.errors import CheckpointError, ConfigError
from erw.training import load
from erw.training.checkpoint import paths
from erw.training.loop import Trainer
from erw.training.trained import RECIPE, WEIGHTS
from helpers.tiny import tiny_run
from helpers.training import assert_same_run, go

Change = Callable[[dict[str, Tensor], dict[str, str]], object]
"""Changes the tensors or the header of a checkpoint."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may catch it."""


@pytest.mark.parametrize("at", [4, 12], ids=["at an evaluation", "at the end"])
def test_a_kill_between_a_checkpoint_and_its_weights_is_made_up_for(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def dies(state: Trainer, step: int) -> None:
        if step >= at:
            state.written()
            raise Killed
        whole(state, step)

    whole = Trainer.save_weights
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "save_weights", dies)
        go(tiny_run(cache), tmp_path / "run", at=(4,))
    seen = []
    go(tiny_run(cache), tmp_path / "run", at=(4,), evaluate=lambda *told: seen.append(told))
    assert all(step == model.step for step, model, _ in seen)
    assert_same_run(straight, tmp_path / "run")
    assert load(tmp_path / "run").step == 12


def test_weights_that_were_lost_come_back(cache: Path, straight: Path, tmp_path: Path) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    (out / WEIGHTS).unlink()
    go(tiny_run(cache), out)
    assert_same_run(straight, out)


def test_ctrl_c_during_the_last_evaluation_is_heard(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    def slow(step: int, model: object, world: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 12"):
        go(tiny_run(cache), tmp_path / "run", at=(12,), evaluate=slow)
    seen = []
    go(tiny_run(cache), tmp_path / "run", at=(12,), evaluate=lambda *told: seen.append(told))
    assert len(seen) == 1, "it is made up for"
    assert_same_run(straight, tmp_path / "run")


def changed(path: Path, change: Change) -> None:
    """The newest checkpoint with other tensors, or another header."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    change(tensors, header)
    save_file(tensors, path, metadata=header)


def drop(kind: str) -> Change:
    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        for key in [key for key in tensors if kind in key]:
            del tensors[key]

    return change


def cut(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    key = next(key for key in tensors if key.endswith("exp_avg") and tensors[key].ndim > 1)
    tensors[key] = tensors[key][:1].clone()


@pytest.mark.parametrize(
    "change",
    [
        drop("optim."),
        drop("exp_avg_sq"),
        cut,
        lambda tensors, header: tensors.update({"junk.a": torch.zeros(2)}),
        lambda tensors, header: tensors.update({"optim.bogus.exp_avg": torch.zeros(2)}),
        lambda tensors, header: header.update(progress="{"),
        lambda tensors, header: header.update(progress='{"step": 12}'),
        lambda tensors, header: header.update(progress="[1]"),
    ],
    ids=["moments", "second", "short", "junk", "bogus", "json", "keys", "list"],
)
def test_a_checkpoint_that_was_changed_is_refused(
    cache: Path, straight: Path, tmp_path: Path, change: Change
) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    before = (out / RECIPE).read_bytes()
    for older in paths(out / "checkpoints")[:-1]:
        older.unlink()  # else the run would go on from there
    changed(paths(out / "checkpoints")[-1], change)
    with pytest.raises(CheckpointError, match="step-00000012") as caught:
        go(tiny_run(cache).replace(steps=14), out)
    assert "\n" not in str(caught.value)
    assert (out / RECIPE).read_bytes() == before


def test_a_line_of_metrics_without_a_step_is_named(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    with (out / "metrics.jsonl").open("a") as file:
        file.write("[1]\n")
    with pytest.raises(CheckpointError, match=r"line [0-9]+ is no JSON object with a step"):
        go(tiny_run(cache).replace(steps=14), out)


def test_fewer_steps_than_were_made_change_nothing(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(CheckpointError, match="at step 12 already, past the 10"):
        go(tiny_run(cache).replace(steps=10), out)
    assert json.loads((out / RECIPE).read_text())["run"]["steps"] == 12


def test_a_disk_that_is_full_at_the_start_leaves_nothing_half_written(
    cache: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(os, "fsync", full)
        go(tiny_run(cache), tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run" / RECIPE)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name != ".lock"]
    (tmp_path / "run" / f".{RECIPE}.1.part").write_text("of a kill")
    go(tiny_run(cache), tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("setting", [{"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"ema": 1.0}])
def test_averages_that_never_move_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected (a number|numbers) in \[0, 1\)"):
        Optim(**setting)


def test_what_comes_first_is_still_there(cache: Path, tmp_path: Path) -> None:
    """A folder that holds other files is refused before anything is written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files and no run"):
        go(tiny_run(cache), tmp_path / "run")
    assert not (tmp_path / "run" / RECIPE).exists()
