"""SIGKILL at random moments, again and again, of runs, of one rank of two, also of two that save in
the background, and of preparing: the same command ends with the bits of what was never stopped.

`make torture` kills 200 times, two fifths of them alone; the suite a few.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.forked import Python
from helpers.tiny import tiny_cache
from helpers.torture import KILLS, LONG, SEED, TINY, Begin, alone, two
from helpers.training import assert_same_run


def outlived(
    begin: Begin, out: Path, rng: random.Random, *, lasts: float, kills: int
) -> tuple[int, float]:
    """Start a command until it ends well, killing one of its processes at a random moment up to
    `kills` times; how often one was killed, and the seconds of the last, unbroken start."""
    killed = 0
    while True:
        processes, now = begin(out), time.monotonic()
        wanted = killed < kills
        moment = now + rng.uniform(0.2, lasts) if wanted else float("inf")
        while any(p.poll() is None for p in processes) and time.monotonic() < moment:
            time.sleep(0.002)
        victim = rng.choice(processes)
        if wanted and victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            killed += 1
        for p in processes:  # the other rank hears of it, or is stopped as torchrun would
            try:
                p.wait(5 if wanted else 300)
            except TimeoutError:
                p.wait()
        codes = [p.poll() for p in processes]
        if codes == [0] * len(processes):
            return killed, time.monotonic() - now
        assert wanted, [p.err for p in processes]


@pytest.mark.parametrize(
    "how,share",
    [
        ("alone", 0.4),
        ("scored", 0.2),
        ("two ranks", 0.2),
        pytest.param("two shards", 0.2, marks=LONG),
    ],
    ids=["alone", "scored", "two ranks", "two shards"],
)
def test_kills_at_random_moments_change_no_bit(
    cache: Path, tmp_path: Path, how: str, share: float
) -> None:
    words = {"scored": ["--eval-every", 4], "two shards": ["--strategy", "fsdp2"]}.get(how, [])
    begin = (two if how.startswith("two") else alone)(cache, *words)
    rng = random.Random(f"{SEED} {how}")
    straight = tmp_path / "straight"
    _, lasts = outlived(begin, straight, rng, lasts=0.0, kills=0)
    done, number, wanted = 0, 0, max(2, round(KILLS * share))
    while done < wanted:
        number += 1
        out = tmp_path / str(number)
        killed, _ = outlived(begin, out, rng, lasts=lasts, kills=min(4, wanted - done))
        done += killed
        assert_same_run(straight, out)
    if KILLS:
        print(f"{how}: {done} kills of {number} runs, each ended in the same bits")


def test_preparing_survives_kills(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from helpers.tiny import tiny_cache\n"
        "torch.set_num_threads(1); tiny_cache(Path(sys.argv[1]), count=48, rows_per_shard=8)"
    )

    def begin(out: Path) -> list[Python]:
        return [Python("-c", code, out, env={"PYTHONPATH": str(TINY.parents[1])})]

    whole = tiny_cache(tmp_path / "straight", count=48, rows_per_shard=8)
    rng, done, wanted = random.Random(SEED), 0, max(1, round(KILLS * 0.1))
    for number in range(10 * wanted):
        if done >= wanted:
            break
        out = tmp_path / str(number)
        done += outlived(begin, out, rng, lasts=2.0, kills=min(3, wanted - done))[0]
        for path in sorted(whole.path.glob("shards/*")):
            assert (out / "shards" / path.name).read_bytes() == path.read_bytes(), path.name
    assert done == wanted


def test_torchrun_goes_on_by_itself_when_a_worker_is_killed(cache: Path, tmp_path: Path) -> None:
    out, straight = tmp_path / "run", tmp_path / "straight"
    assert all(p.wait() == 0 for p in two(cache)(straight))
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    words = [sys.executable, "-m", *launch, TINY, cache, out, "--slow", "0.3"]
    running = subprocess.Popen([str(word) for word in words])
    while not list(out.glob("checkpoints/step-*")):
        assert running.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(random.Random(SEED).choice(children)), signal.SIGKILL)
    assert running.wait(300) == 0
    assert_same_run(straight, out)
