"""Two machines on one: network namespaces, each with torchrun, and a cable between them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.torture import LONG, TINY, two
from helpers.training import assert_same_run

NAMES = ("erw-first", "erw-second")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@pytest.fixture
def machines() -> Iterator[None]:
    """Namespaces `NAMES` of `ADDRESSES`, joined by the interfaces `cable0` and `cable1`."""
    if not (shutil.which("ip") and ip("netns", "add", NAMES[0]) and ip("netns", "add", NAMES[1])):
        pytest.skip("makes network namespaces: needs iproute2 and root")
    try:
        peer = ["peer", "name", "cable1", "netns", NAMES[1]]
        assert ip("link", "add", "cable0", "netns", NAMES[0], "type", "veth", *peer)
        for i, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{i}")
            assert ip("-n", name, "link", "set", f"cable{i}", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def torchrun(machine: int, *words: object) -> subprocess.Popen[bytes]:
    """One process there of an elastic job, which goes on with one machine if need be."""
    launch = ["torch.distributed.run", "--nnodes=1:2", "--max-restarts=3", "--nproc-per-node=1"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=erw"]
    launch += [f"--rdzv-conf=is_host={machine == 0},join_timeout=60,last_call_timeout=5"]
    launch += [f"--local-addr={ADDRESSES[machine]}", str(TINY)]
    command = ["ip", "netns", "exec", NAMES[machine], sys.executable, "-m", *launch]
    env = os.environ | {"GLOO_SOCKET_IFNAME": f"cable{machine}"}
    return subprocess.Popen(
        [*command, *map(str, words)], env=env, stderr=subprocess.DEVNULL, start_new_session=True
    )


def end(job: subprocess.Popen[bytes]) -> None:
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@LONG
@pytest.mark.usefixtures("machines")
def test_two_machines_train_what_two_processes_do(cache: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert all(p.wait() == 0 for p in two(cache)(straight))
    jobs = [torchrun(i, cache, out) for i in (0, 1)]
    try:
        assert [job.wait(200) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            end(job)
    assert_same_run(straight, out)


@LONG
@pytest.mark.usefixtures("machines")
def test_a_machine_that_is_lost_leaves_the_other_to_go_on(cache: Path, tmp_path: Path) -> None:
    """The cable is cut and the machine stopped at once: nothing tells the other of it but silence.
    It starts again by itself from the last checkpoint, alone, with the same batches."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert all(p.wait() == 0 for p in two(cache)(straight))
    jobs = [torchrun(i, cache, out, "--slow", 1.5, "--patience", 5) for i in (0, 1)]
    try:
        while not list(out.glob("checkpoints/step-*")):
            assert [job.poll() for job in jobs] == [None, None]
            time.sleep(0.1)
        assert ip("-n", NAMES[1], "link", "set", "cable1", "down")
        end(jobs[1])
        assert jobs[0].wait(200) == 0
    finally:
        for job in jobs:
            end(job)

    def losses(run: Path) -> list[float]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses(out) == pytest.approx(losses(straight), rel=1e-4)
