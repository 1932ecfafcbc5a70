"""What a long run says of itself: how far it is, and how long it still takes."""

import pytest

from erw.log import Console


def lefts(
    steps: list[tuple[int, float, float | None]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """The end of each line said after (step of 10, at this second, share of the work)."""
    seconds = iter([0.0, *(at for _, at, _ in steps)])
    monkeypatch.setattr("erw.log.time.monotonic", lambda: next(seconds))
    console = Console("x", every=0)
    for step, _, share in steps:
        console.step(step, 10, share)
    return [line.partition(")")[2].strip() for line in capsys.readouterr().err.splitlines()]


def test_time_left_counts_from_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Loading took 100 seconds, a step takes 5.
    steps = [(1, 100.0, None), (2, 105.0, None), (6, 125.0, None), (10, 145.0, None)]
    assert lefts(steps, monkeypatch, capsys) == ["", "0:40 left", "0:20 left", "0:00 left"]


def test_steps_that_cost_less_do_not_promise_too_much(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Five steps of 1 second, then five of 9.
    steps = [(1, 1.0, 0.02), (5, 5.0, 0.1), (6, 14.0, 0.28), (10, 50.0, 1.0)]
    assert lefts(steps, monkeypatch, capsys) == ["", "0:45 left", "0:36 left", "0:00 left"]


def test_a_resumed_run_judges_by_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [(8, 50.0, None), (9, 52.0, None)]
    assert lefts(steps, monkeypatch, capsys) == ["", "0:02 left"]
