"""Metrics reach the tracker that `log.to` names."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from erw.config import Run
from erw.errors import ConfigError
from erw.sinks import sink

LINE = {"kind": "train", "step": 4, "phase": "full", "lr": 0.5, "losses": {"flow": 0.9}}


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_get_numbers_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options),
        log=lambda values, step: calls.append((values, step)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    write = sink(name, Run(steps=7), tmp_path / "a")
    write(LINE)
    assert calls[0]["name"] == "a" and calls[0]["config"]["steps"] == 7
    assert calls[1] == ({"train/lr": 0.5, "train/losses/flow": 0.9}, 4)


def test_tensorboard_hides_the_steps_that_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *what: Any) -> None:
            calls.append(what)

        def flush(self) -> None:
            pass

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    write = sink("tensorboard", Run(), tmp_path)
    write(LINE)
    write(LINE | {"step": 5, "losses": {}})
    assert calls == [
        (str(tmp_path / "tensorboard"), 4),
        ("train/lr", 0.5, 4),
        ("train/losses/flow", 0.9, 4),
        ("train/lr", 0.5, 5),
    ]


def test_a_name_or_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean wandb"):
        sink("wanbd", Run(), tmp_path)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        sink("trackio", Run(), tmp_path)
