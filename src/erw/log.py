"""What a run reports: metrics as JSON lines, and a progress bar with time left."""

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from erw.errors import CheckpointError
from erw.io import write_text


class Metrics:
    """`metrics.jsonl`: one JSON object a line, in step order, no step twice.

    Opening it for a run that goes on from step N drops every line after N (they will be written
    again) and a last line that was cut off by a kill.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = (
            [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
        )
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it is on its way to the disk when this returns."""
        append_metrics(self.path, line)


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one line to a metrics file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line without its end is left out.

    Raises:
        CheckpointError: a line in the middle is not JSON, or says no step.
    """
    lines = path.read_text().split("\n")[:-1]
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            found["step"] + 0
            out.append(found)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}, line {number} is no JSON object with a step ({error}); the file was "
                "changed by hand"
            ) from error
    return out


class Progress:
    """A progress bar with time left on a terminal; a line every 15 seconds anywhere else.

    The time left is judged from the work done since this process began, so what an earlier start
    has done belongs into `done`. It is a context manager, so that an error ends the bar's line.

    Args:
        title: stands first.
        total: all of the work, in `unit`s: steps, images, or FLOPs where steps differ in cost.
        done: of `total`, behind us already.
        unit: of the rate that is shown ("images": 12.3 images/s); empty: no rate.
        quiet: show nothing (ranks other than the first).
    """

    def __init__(
        self, title: str, total: float, *, done: float = 0, unit: str = "", quiet: bool = False
    ) -> None:
        from tqdm import tqdm

        self._quiet, terminal = quiet, sys.stderr.isatty()
        rate = ", {rate_fmt}" if unit else ""
        self._bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=f" {unit}",
            disable=quiet,
            file=sys.stderr if terminal else _Lines(),
            mininterval=0.2 if terminal else 15.0,
            delay=0.0 if terminal else 15.0,  # what fails at once ends with its error alone
            smoothing=0.02,
            dynamic_ncols=terminal,
            bar_format="{desc} {percentage:3.0f}%" + rate + "{postfix}, {remaining} left",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, amount: float = 1) -> None:
        """So much more of the work is done."""
        self._bar.update(amount)

    def note(self, text: str) -> None:
        """What stands beside the progress from now on."""
        self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._quiet:
            say(text)


class _Lines:
    """Standard error for a bar that is not on a terminal: whole lines, none without content."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip("\r\n"), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def say(text: str) -> None:
    """A line on standard error, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


class Reporter(Protocol):
    """What the training loop tells: a line (`say`), how it goes (`note`), each step done (`step`).

    `share` is how much of all work is done then, where steps are not equally dear.
    """

    def say(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, step: int, steps: int, share: float | None = None) -> None: ...


class Silent:
    """Says nothing: for ranks but the first, and for callers with a display of their own."""

    def say(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def step(self, step: int, steps: int, share: float | None = None) -> None:
        pass


class Console:
    """A progress bar with time left on a terminal; a line now and then anywhere else."""

    def __init__(self, title: str, *, every: float = 15.0) -> None:
        self.title, self.every, self.line = title, every, ""
        self.began, self.first, self.last = time.monotonic(), -1.0, 0.0
        self.terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What stands beside the progress from now on."""
        self.line = text

    def step(self, step: int, steps: int, share: float | None = None) -> None:
        """Show progress; time left is judged from the work done since this process's first step."""
        now, share = time.monotonic(), step / steps if share is None else share
        if self.first < 0:
            self.first, self.began = share, now
        wait = 0.2 if self.terminal else self.every
        if step < steps and now - self.last < wait:
            return
        self.last = now
        text = f"{self.title}  {step}/{steps} ({step / steps:.0%})  {self.line}"
        if share > self.first:
            text += f"  {clock((now - self.began) * (1 - share) / (share - self.first))} left"
        end = "\n" if step == steps or not self.terminal else ""
        print(("\r\x1b[K" if self.terminal else "") + text, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
