"""One display for a whole study: what is being done, how much of everything is done, and time left.

Time left comes from all the work that is planned, each kind at the rate measured for it; a kind
that has not begun is taken at its expected rate, corrected by how far the others were off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from erw.data.sources import Source
from erw.log import clock


@dataclass
class Kind:
    """One kind of work: units in all, expected seconds a unit, and what was measured here."""

    total: float
    expected: float
    done: float = 0.0  # in all, also before this start
    timed: float = 0.0  # units whose time was taken in this start
    seconds: float = 0.0


class Work:
    """The planned work of a study. `expected` is seconds a unit by kind, roughly right at best."""

    def __init__(self, totals: Mapping[str, float], *, expected: Mapping[str, float]) -> None:
        self.kinds = {name: Kind(total, expected[name]) for name, total in totals.items()}
        self.began = time.monotonic()

    def skip(self, kind: str, units: float) -> None:
        """Work found done: it takes no time and says nothing about rates."""
        self.kinds[kind].done += units

    def add(self, kind: str, units: float, *, seconds: float) -> None:
        """Work done now."""
        entry = self.kinds[kind]
        entry.done += units
        entry.timed += units
        entry.seconds += seconds

    def left(self) -> float:
        """Seconds until all is done."""
        begun = [k for k in self.kinds.values() if k.timed]
        # As if 10 s had gone as expected: the first few units of the first kind say little.
        factor = (sum(k.seconds for k in begun) + 10) / (
            sum(k.timed * k.expected for k in begun) + 10
        )
        total = 0.0
        for kind in self.kinds.values():
            prior = 0.02 * kind.total  # so many units at the expected rate, for the same reason
            seconds = kind.seconds + prior * kind.expected * factor
            rate = seconds / (kind.timed + prior) if kind.total else 0.0
            total += max(0.0, kind.total - kind.done) * rate
        return total

    def elapsed(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self.began

    def share(self) -> float:
        """How much of this start's time has passed, 0 to 1."""
        passed = self.elapsed()
        return passed / max(passed + self.left(), 1e-9)


class Display:
    """Shows `Work`: a bar on a terminal, a line now and then anywhere else."""

    def __init__(self, work: Work, *, every: float = 15.0) -> None:
        self.work, self.every, self.last = work, every, 0.0
        self.bar: Any = None
        self.task: Any = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, what: str) -> None:
        """What is being done now."""
        left = clock(self.work.left())
        if self.bar:
            self.bar.update(self.task, description=what, completed=self.work.share(), left=left)
        elif time.monotonic() - self.last > self.every:
            self.last = time.monotonic()
            print(f"{self.work.share():4.0%}  {left} left  {what}", file=sys.stderr, flush=True)


@contextmanager
def display(work: Work) -> Iterator[Display]:
    """The display while a study runs; the bar is gone afterwards, the lines said remain."""
    shown = Display(work)
    if not sys.stderr.isatty():
        yield shown
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]} left"),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown.bar:
        shown.task = shown.bar.add_task("starting", total=1.0, left=clock(work.left()))
        yield shown


class StepReporter:
    """The training loop's reporter inside a study: its steps move the study's display.

    `flops_at(step)` is the run's total cost after `step` steps; up to step `done` the display has
    counted it.
    """

    def __init__(
        self, shown: Display, *, name: str, flops_at: Callable[[int], int], done: int = 0
    ) -> None:
        self.shown, self.name, self.flops_at = shown, name, flops_at
        self.line, self.done, self.time = "", done, 0.0

    def say(self, text: str) -> None:
        """The loop's introduction is in the run's folder; here it would crowd the display."""

    def note(self, text: str) -> None:
        """What stands beside the step from now on."""
        self.line = text

    def step(self, step: int, steps: int, share: float | None = None) -> None:
        """Count the step's FLOPs and time. Steps before this start are work found done."""
        now = time.monotonic()
        units = float(self.flops_at(step) - self.flops_at(self.done))
        if self.time and self.done == step - 1:
            self.shown.work.add("train", units, seconds=now - self.time)
        else:
            self.shown.work.skip("train", units)
        self.done, self.time = step, now
        self.shown.show(f"{self.name}  step {step}/{steps}  {self.line}")

    def rest(self, seconds: float) -> None:
        """Take out time that was not training: an evaluation between two steps."""
        self.time += seconds


class Counted:
    """A source that tells the display of each image read from it, as work of kind "prepare"."""

    def __init__(self, source: Source, shown: Display) -> None:
        self.source, self.shown = source, shown
        self.name, self.class_names = source.name, source.class_names
        self.read, self.time, self.lock = 0, 0.0, Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        item = self.source[index]
        with self.lock:  # several threads read
            now = time.monotonic()
            # Before the first image come loading and drawing, which say nothing about the rest.
            self.shown.work.add("prepare", 1, seconds=now - (self.time or now))
            self.read, self.time = self.read + 1, now
            self.shown.show(f"preparing image {index + 1} of {len(self)}")
        return item

    def fingerprint(self) -> str:
        """The source's own."""
        return self.source.fingerprint()
