"""The metrics of a run survive a kill."""

from pathlib import Path

import pytest

from erw.config import Plan
from erw.errors import CheckpointError
from erw.log import read_metrics
from erw.training import Ledger
from erw.training.checkpoint import Position
from erw.training.flops import Rate
from erw.training.metrics import Metrics
from helpers.training import HERE

LEDGER = Ledger(Plan(), 4, (Rate(0, 9, False, 10, False),), 0, 0)


def test_metrics_go_on_from_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, Position(0, 0.0, {}), ledger=LEDGER, processes=HERE, sink=None)
    for step in (1, 2, 3):
        metrics.write({"kind": "train"}, step)
    with path.open("a") as file:
        file.write('{"step": 4')  # cut off by a kill
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    metrics = Metrics(path, Position(2, 7.0, {}), ledger=LEDGER, processes=HERE, sink=None)
    metrics.write({"kind": "eval", "again": True}, 3)
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["again"]
    assert lines[-1]["images"] == 12 and lines[-1]["flops_total"] == 120
    assert lines[-1]["seconds"] >= 7
    path.write_text("[1]\n")
    with pytest.raises(CheckpointError, match="line 1 is no JSON object with a step"):
        read_metrics(path)
