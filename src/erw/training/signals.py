"""What asks a run to stop: Ctrl-C, and SIGTERM and SIGUSR1 of a queue."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from erw.errors import Preempted


def stopped(signals: Sequence[int], at: str) -> KeyboardInterrupt:
    """What ends a run or a study that was asked to stop, once what it did is saved."""
    kind = KeyboardInterrupt if signal.SIGINT in signals else Preempted
    return kind(f"stopped {at}; the same command goes on from there")


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGUSR1, which Slurm sends ahead of a limit, in a list that the
    loop looks at; a second one of a kind does at once what it did before."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before: dict[int, Any] = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield caught
    finally:
        for number in numbers:
            signal.signal(number, before[number])
