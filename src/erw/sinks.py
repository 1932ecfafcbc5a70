"""Metrics for TensorBoard, trackio or Weights & Biases, besides `metrics.jsonl`."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erw.config import Run, nearest, to_dict
from erw.errors import ConfigError

Write = Callable[[dict[str, Any]], None]


def sink(name: str, run: Run, out: str | Path) -> Write:
    """A function that writes one line of metrics to the tracker `name` (a key of `SINKS`).

    Raises:
        ConfigError: there is no tracker of that name, or its package is not installed.
    """
    if name not in SINKS:
        raise ConfigError(f"unknown log.to {name!r}{nearest(name, SINKS)}")
    try:
        return SINKS[name](run, Path(out))
    except ImportError as error:
        raise ConfigError(f"log.to {name} needs its package: pip install {name}") from error


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name: {"losses": {"flow": 0.9}} gives "train/losses/flow"."""
    flat = {}
    for name, value in line.items():
        group = value if isinstance(value, dict) else {"": value}
        for inner, number in group.items():
            if type(number) in (int, float) and name != "step":
                flat["/".join(filter(None, (line.get("kind"), name, inner)))] = number
    return flat


def tensorboard(run: Run, out: Path) -> Write:
    """Event files in `out`/tensorboard; a resumed run hides the steps that it makes again."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def write(line: dict[str, Any]) -> None:
        nonlocal writer
        writer = writer or SummaryWriter(str(out / "tensorboard"), purge_step=line["step"])
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def tracker(module: str, run: Run, out: Path) -> Write:
    """trackio and wandb share one interface; a resumed run goes on under the same name."""
    api = importlib.import_module(module)
    name = out.resolve().name
    options = {"id": name, "dir": str(out)} if module == "wandb" else {}
    api.init(project="erw", name=name, config=to_dict(run), resume="allow", **options)
    return lambda line: api.log(scalars(line), step=line["step"])


SINKS: dict[str, Callable[[Run, Path], Write]] = {
    "tensorboard": tensorboard,
    "trackio": lambda run, out: tracker("trackio", run, out),
    "wandb": lambda run, out: tracker("wandb", run, out),
}
"""name -> what makes its function; a user may add one."""
