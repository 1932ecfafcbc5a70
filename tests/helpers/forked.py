"""Python in a process of its own that need not import torch again: forked from one that has.

Such a child is a process like any other: its memory, streams, signals and exit code are its own,
and the one that it is forked from has done nothing but import.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.multiprocessing import start_processes

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([
    "torch.distributed", "erw.training.loop", "erw.data.prepare", "erw.evaluation.callback",
    "erw.interop.pretrained", "erw.sampling.preview", "erw.cli.train", "torch._dynamo",
    "erw.sharding", "erw.training.sharded",
])  # fmt: skip


class Python:
    """`python *argv`, begun: a script, or what follows "-m" or "-c". Variables of the environment
    are added to ours; no file may grow beyond `largest_file` bytes."""

    def __init__(
        self, *argv: object, env: Mapping[str, str] | None = None, stdin: str = "",
        largest_file: int | None = None,
    ) -> None:  # fmt: skip
        folder = Path(tempfile.mkdtemp(prefix="erw-python-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.streams = [folder / name for name in ("in", "out", "err")]
        self.streams[0].write_text(stdin)
        variables = dict(os.environ) | dict(env or {})
        words = [str(word) for word in argv]
        self.process = FORK.Process(
            target=_run, args=(words, variables, self.streams, largest_file)
        )
        self.process.start()

    def poll(self) -> int | None:
        """The exit code, the negative number of the signal that ended it; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """The exit code once it has ended; it is killed, and TimeoutError raised, after so long."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(self.err)
        return self.process.exitcode

    @property
    def out(self) -> str:
        return self.streams[1].read_text()

    @property
    def err(self) -> str:
        return self.streams[2].read_text()


def ranks(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of `count` processes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    where["WORLD_SIZE"] = str(count)
    return [where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _run(
    argv: list[str], env: Mapping[str, str], streams: Sequence[Path], largest_file: int | None
) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(streams):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - Python's own was closed before the fork
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    kind, *rest = argv
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(kind, run_name="__main__")


def both(function: Callable[..., None], *args: object) -> None:
    """Call a function with the numbers 0 and 1 and `args`, at once, in a process each."""
    start_processes(function, args, nprocs=2, start_method="forkserver")
