"""What a run reports: metrics as JSON lines, and a progress bar with time left."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erw.errors import CheckpointError

Sink = Callable[[dict[str, Any]], None]
"""Takes a line of metrics."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line without its end is left out.

    Raises CheckpointError for a line in the middle that is not JSON, or has no step.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            out.append(json.loads(line))
            out[-1]["step"] + 0
            out[-1]["kind"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            problem = f"{path}, line {number} is no JSON object with a step and a kind ({error})"
            raise CheckpointError(problem) from error
    return out


class Progress:
    """A progress bar with time left on a terminal; a line every 15 seconds anywhere else.

    Args:
        total: all of the work, in `unit`s: steps, images, or FLOPs where steps differ in cost.
        done: of `total`, by an earlier start; the time left is judged from what follows.
        unit: of the rate that is shown ("images": 12.3 images/s); empty: no rate.
        quiet: show nothing (ranks other than the first).
    """

    def __init__(
        self, title: str, total: float, *, done: float = 0, unit: str = "", quiet: bool = False
    ) -> None:
        from tqdm import tqdm

        self._quiet, terminal = quiet, sys.stderr.isatty()
        tqdm.monitor_interval = 0  # its thread would repeat lines that stand too long
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
