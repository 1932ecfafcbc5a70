"""A healthy run has nothing odd; runs that were broken on purpose are named for what was broken."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erw.cli import main
from erw.config import Log, Run, to_dict
from erw.data.cache import Cache
from erw.io import read_json
from erw.log import read_metrics
from erw.models.sit import SiT
from erw.plan import SIT
from erw.recipes import names, recipe
from erw.study import doctor
from erw.study.doctor import examine
from helpers.tiny import tiny_run
from helpers.training import go

STEPS = 240


def small(cache: Path, **optim: Any) -> Run:
    run = tiny_run(cache, plan=SIT, steps=STEPS, log=Log(every=20, checkpoint=STEPS))
    optim = {"lr": 2e-3, "lr_warmup": 10, "ema": 0.9} | optim
    model = dataclasses.replace(run.model, depth=2)
    return run.replace(model=model, optim=dataclasses.replace(run.optim, **optim))


@pytest.fixture(scope="module")
def healthy(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("healthy") / "run"
    go(small(cache), out)
    return out


@pytest.fixture
def curves(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The healthy run's, in the bank."""
    lines = read_metrics(healthy / "metrics.jsonl")
    values = {"step": [x["step"] for x in lines], "flow": [x["losses"]["flow"] for x in lines]}
    values["grad_norm"] = [x["grad_norm"] for x in lines]
    run = read_json(healthy / "recipe.json")["run"]
    monkeypatch.setattr(doctor, "CURVES", {doctor.kind_of(run): values})


def odd(out: Path) -> set[str]:
    return {finding.check for finding in examine(out, count=48) if not finding.good}


@pytest.mark.usefixtures("curves")
def test_a_healthy_run_has_nothing_odd(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", str(healthy), "--images", "48"]) == 0
    said = capsys.readouterr().out
    assert "5 checks, nothing odd" in said and "ODD" not in said


def turned(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, x, t, *args, **options: forward(self, x, 1 - t, *args, **options)


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize(
    "what,optim",
    [("EMA", {"ema": 0.9999}), ("curve", {"lr": 2e-5}), ("curve", {"lr": 0.3, "clip": 1e3})],
    ids=["average", "low rate", "high rate"],
)
def test_a_setting_that_is_wrong(
    cache: Path, tmp_path: Path, what: str, optim: dict[str, Any]
) -> None:
    go(small(cache, **optim), tmp_path / "run")
    assert what in odd(tmp_path / "run")


def test_times_the_other_way_round(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SiT, "forward", turned(SiT.forward))
        go(small(cache), tmp_path / "run")
    assert "times" in odd(tmp_path / "run")


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("what", ["labels", "latents"])
def test_data_that_are_not_what_they_seem(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    read = Cache.read

    def broken(self: Cache, rows: Any, **options: Any) -> Any:
        batch = read(self, rows, **options)
        if what == "latents":  # a scale applied twice
            return batch._replace(mean=0.2 * batch.mean, std=0.2 * batch.std)
        rng = np.random.default_rng(int(np.sum(rows)))  # another class every time
        return batch._replace(labels=torch.from_numpy(rng.integers(0, 9, len(batch.labels))))

    monkeypatch.setattr(Cache, "read", broken)
    go(small(cache), tmp_path / "run")
    assert what in odd(tmp_path / "run")


def test_the_bank_has_curves_of_small_recipes() -> None:
    kinds = {doctor.kind_of(json.loads(json.dumps(to_dict(recipe(n))))): n for n in names()}
    for kind, curve in doctor.CURVES.items():
        assert kinds[kind] == curve["name"], "the recipe has changed: run scripts/curves.py"
        assert len(curve["step"]) == len(curve["flow"]) == len(curve["grad_norm"]) > 8
        assert curve["flow"][-1] < curve["flow"][0] and json.dumps(curve)
