"""A run that hangs ends, and names who is to blame."""

import signal
from pathlib import Path

import pytest

from erw.training.watch import HANGS
from helpers.forked import Python, ranks
from helpers.tiny import tiny_run
from helpers.training import assert_same_run, go

TINY = Path(__file__).parents[1] / "helpers" / "tiny.py"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_others_name_a_rank_that_is_stopped(cache: Path, tmp_path: Path, strategy: str) -> None:
    words = [TINY, cache, tmp_path / "run", "--stop-after", 5, "--patience", 4]
    first, second = (Python(*words, "--strategy", strategy, env=env) for env in ranks(2))
    try:
        assert first.wait(120) == HANGS, first.err
        assert "rank 0 has been in step 6 for" in first.err
        assert "rank 1 answers no more (1 of 2)" in first.err
    finally:
        second.send_signal(signal.SIGKILL)
        second.wait()


def test_reading_that_hangs_ends_and_the_run_goes_on(
    cache: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = Python(TINY, cache, out, "--no-batch-after", 6, "--patience", 1)
    assert run.wait(120) == HANGS, run.err
    assert "rank 0 has been reading the batch of step 7 for" in run.err
    go(tiny_run(cache), out)
    assert_same_run(straight, out)


def test_a_rank_that_others_wait_for_is_named(cache: Path, tmp_path: Path) -> None:
    words = [TINY, cache, tmp_path / "run", "--no-batch-after", 6, "--patience", 4]
    both = [Python(*words, env=env) for env in ranks(2)]
    codes = [process.wait(120) for process in both]
    said = "".join(process.err for process in both)
    assert HANGS in codes and "rank 1 is reading the batch of step 7 (1 of 2)" in said
