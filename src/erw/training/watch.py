"""A run that hangs ends, and says which process is to blame, where it would wait in silence.

Each process says where it is; a thread of its own tells the others through their common store. Once
a process has been at one place for longer than it may, it names those that are behind and ends.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from erw.dist import World

HANGS = 4
"""The exit code of a process that ends so."""
PLACES = ("reading the batch of step {}", "in step {}", "saving after step {}")
READING, STEPPING, SAVING = range(3)


@contextmanager
def watching(world: World, patience: float) -> Iterator["Watch"]:
    """Watch what is done inside; `patience` in seconds, 0: for ever."""
    watch = Watch(world)
    if patience:
        threading.Thread(target=watch.run, args=(patience,), daemon=True).start()
    try:
        yield watch
    finally:
        watch.ended.set()


class Watch:
    """Where this process is, and since when."""

    def __init__(self, world: World) -> None:
        self.rank, self.ranks = world.rank, range(world.size)
        self.ended, self.beats = threading.Event(), 0
        self.step, self.place, self.since = 0, READING, math.inf
        group: Any = dist.group.WORLD if world.size > 1 else None
        self.store = group.get_group_store().clone() if group else None

    def at(self, place: int, step: int) -> None:
        """This process is now at a place of a step, counted from 1; each comes after the last."""
        self.step, self.place, self.since = step, place, time.monotonic()

    def rest(self) -> None:
        """What comes now may take any time, as scoring does."""
        self.since = math.inf

    def run(self, patience: float) -> None:
        """Tell the others, several times in the time that a process may take, and look."""
        between = min(patience / 4, 30.0)
        while not self.ended.wait(between):
            try:
                self.tell()
                if time.monotonic() - self.since > patience:
                    print(f"error: {self.blame(between)}", file=sys.stderr, flush=True)
                    os._exit(HANGS)  # nobody else can end a main thread that waits
            except RuntimeError:
                self.store = None  # it went with the first process

    def tell(self) -> None:
        self.beats += 1
        if self.store:
            state = json.dumps([self.beats, self.step, self.place])
            self.store.set(f"watch/{self.rank}", state)

    def heard(self) -> list[list[int]]:
        """Heartbeats, step and place that each process told of last."""
        store: Any = self.store
        keys = [f"watch/{rank}" for rank in self.ranks]
        return [json.loads(store.get(key)) if store.check([key]) else [0, 0, 0] for key in keys]

    def blame(self, between: float) -> str:
        """Which processes keep the others waiting, in a sentence."""
        seconds, here = time.monotonic() - self.since, PLACES[self.place].format(self.step)
        what = f"has been {here} for {seconds:.0f} s, longer than dist.patience"
        if not self.store:
            return f"rank {self.rank} {what}: the same command goes on from the last checkpoint"
        before = self.heard()
        for _ in range(2):  # whoever still runs tells again
            time.sleep(between)
            self.tell()
        after = self.heard()
        silent = [rank for rank in self.ranks if after[rank][0] == before[rank][0]]
        last = min(state[1:] for state in after)
        blamed = silent or [rank for rank in self.ranks if after[rank][1:] == last]
        named = [
            f"rank {r} {'answers no more' if r in silent else f'is {PLACES[place].format(step)}'}"
            for r in blamed[:8]
            for _, step, place in [after[r]]
        ]
        return f"rank {self.rank} {what}; {'; '.join(named)} ({len(blamed)} of {len(self.ranks)})"
