"""What a long run reports: metrics that survive a cut-off line, progress with the time left."""

import pytest

from erw.log import Progress


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
