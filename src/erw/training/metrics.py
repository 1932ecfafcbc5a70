"""What a run reports while it trains: `metrics.jsonl`, its costs and the means of its losses."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Any

import torch

from erw.dist import World
from erw.io import write_text
from erw.log import Sink, read_metrics
from erw.training.checkpoint import Position
from erw.training.flops import Ledger
from erw.training.objective import Losses


class Metrics:
    """The metrics file of a run: one JSON object a line, in step order, no step twice.

    A run that goes on from a step drops the lines after it (they will be written again) and a last
    line that was cut off by a kill. Only the first process writes.

    The sums are by name and on the device, so that no step waits for a number. Which losses there
    are changes with the phase: there is one vector of sums for each set of names, its last number
    the steps.
    """

    def __init__(
        self, path: Path, start: Position, *, ledger: Ledger, processes: World, sink: Sink | None
    ) -> None:
        self.path, self.ledger, self.processes, self.sink = path, ledger, processes, sink
        self.began, self.stopped = time.monotonic() - start.seconds, 0.0
        options: dict[str, Any] = {"dtype": torch.float64, "device": processes.device}
        self.sums = {names: torch.tensor(v, **options) for names, v in start.sums.items()}
        if processes.first:
            lines = read_metrics(path) if path.exists() else []
            earlier = [json.dumps(line) + "\n" for line in lines if line["step"] <= start.step]
            write_text(path, "".join(earlier))

    @property
    def seconds(self) -> float:
        """Of training, over stops and starts."""
        return (self.stopped or time.monotonic()) - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the block."""
        self.stopped = time.monotonic()
        yield
        self.began, self.stopped = self.began + time.monotonic() - self.stopped, 0.0

    def add(self, values: Losses) -> None:
        """Add the values of one step to the sums, in one go; of a `bad` one that it was, alone."""
        names, bad = " ".join(values), values["bad"]
        vector = torch.stack([*values.values(), torch.ones_like(bad)]).double()
        zero = torch.zeros_like(bad)  # a mask made on the host would have the device wait
        alone = torch.stack([bad if n == "bad" else zero for n in (*values, "")]).double()
        vector = torch.where(bad > 0, alone, vector)
        self.sums[names] = self.sums[names] + vector if names in self.sums else vector

    def state(self) -> dict[str, list[float]]:
        """The sums by the names in them, averaged over processes."""
        return {names: self.processes.mean(v).tolist() for names, v in self.sums.items()}

    def means(self) -> dict[str, float]:
        """The means over the steps since the last call and over processes, but for the number of
        those that were `bad`, which the means leave out; NaN if all were."""
        pairs: dict[str, list[tuple[float, float]]] = {}
        for names, (*values, count) in self.state().items():
            for name, value in zip(names.split(), values, strict=True):
                pairs.setdefault(name, []).append((value, count))
        self.sums.clear()
        bad = sum(value for value, _ in pairs.pop("bad", ()))
        totals = {name: map(sum, zip(*steps, strict=True)) for name, steps in pairs.items()}
        means = {n: value / count if count else nan for n, (value, count) in totals.items()}
        return means | {"bad": bad}

    def write(self, line: dict[str, Any], step: int) -> None:
        """Write a line with what the run has cost up to `step`."""
        if not self.processes.first:
            return
        spent = {f"flops_{k}": v for k, v in self.ledger.spent(step)._asdict().items()}
        costs = {"step": step, "images": self.ledger.images(step), **spent}
        line = {"kind": line["kind"], **costs, "seconds": self.seconds, **line}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.sink:
            self.sink(line)
