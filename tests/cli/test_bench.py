"""`erw bench`: both phases, FLOPs by the ledger, made-up rows or those of a cache."""

import dataclasses
import json
from pathlib import Path

import pytest

from erw.cli import main
from erw.cli.cost import account
from erw.recipes import recipe, tiny
from erw.training.benchmark import PARTS
from helpers.tiny import tiny_run


@pytest.mark.parametrize("made_up", [True, False], ids=["made up", "cache"])
def test_both_phases_by_the_ledger(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    words, run = ["sit_b2_in256_erw", "--tiny"], tiny(recipe("sit_b2_in256_erw"))
    if not made_up:
        run = tiny_run(cache)
        run = run.replace(optim=dataclasses.replace(run.optim, precision="fp32"))
        words = ["debug", "--data.cache", str(cache), "--model.patch", "8"]
        words += ["--optim.precision", "fp32"]
    assert main(["bench", *words, "--repeat", "1", "--out", "speed.json"]) == 0
    record = json.loads(Path("speed.json").read_text())
    run, _, ledger, *_ = account(run)
    assert [*record["phases"]] == ["warmup", "full"] and record["memory"] > 0
    for step, phase in zip((0, run.plan.warmup), record["phases"].values(), strict=True):
        before, after = ledger.spent(step), ledger.spent(step + 1)
        assert phase["flops"] == after.total - after.teacher - (before.total - before.teacher)
        seconds, *_ = phase["seconds"]
        assert phase["images"] * seconds == pytest.approx(run.data.batch_size)
        assert phase["utilisation"] * record["peak"] * seconds == pytest.approx(phase["flops"])
        assert [*phase["parts"]] == [*PARTS] and min(phase["parts"].values()) >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]
