"""What a long run reports: metrics that survive a cut-off line, progress with the time left."""

from pathlib import Path

import pytest

from erw.errors import CheckpointError
from erw.log import Metrics, Progress, read_metrics


def test_the_time_left_follows_the_work_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Work of 100 behind an earlier 50; 10 a 20 seconds leave 80 seconds, then 60, then 40."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress("x", 100, done=50) as bar:
        for i in range(5):
            now[0] += 20
            bar.note(f"step {i}")
            bar.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[2] for line in lines[:5]] == [
        "01:20 left", "01:00 left", "00:40 left", "00:20 left", "00:00 left",
    ]  # fmt: skip
    assert "x  60%" in lines[0] and "step 0" in lines[0]


def test_a_quiet_bar_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", 1, quiet=True) as bar:
        bar.say("hello")
        bar.update(1)
    assert capsys.readouterr().err == ""


def test_metrics_go_on_from_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, step=0)
    for step in (1, 2, 3):
        metrics.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4')  # cut off by a kill
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    Metrics(path, step=2).write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    path.write_text("[1]\n")
    with pytest.raises(CheckpointError, match="line 1 is no JSON object with a step"):
        read_metrics(path)
