"""Metrics for TensorBoard, trackio or Weights & Biases, besides `metrics.jsonl` (`log.to`)."""

import importlib
from pathlib import Path
from typing import Any

from erw.config import Run, to_dict
from erw.errors import ConfigError, nearest
from erw.log import Sink

SINKS = ("tensorboard", "trackio", "wandb")


def sink(name: str, run: Run, out: str | Path) -> Sink:
    """A function that writes a line of metrics to the tracker `name`, of `SINKS`: of
    {"kind": "train", "losses": {"flow": 0.9}} the number train/losses/flow.

    A resumed run goes on under the same name. Raises ConfigError for an unknown tracker and one
    that is not installed.
    """
    if name not in SINKS:
        raise ConfigError(f"unknown log.to {name!r}{nearest(name, SINKS)}")
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writers: list[SummaryWriter] = []
        else:  # trackio has wandb's interface
            api, title = importlib.import_module(name), Path(out).resolve().name
            api.init(project="erw", name=title, config=to_dict(run), resume="allow")
    except ImportError as error:
        raise ConfigError(f"log.to {name} needs its package: pip install {name}") from error

    def write(line: dict[str, Any]) -> None:
        groups = {k: v if isinstance(v, dict) else {"": v} for k, v in line.items() if k != "step"}
        values = {
            "/".join(filter(None, (line.get("kind"), key, inner))): number
            for key, group in groups.items()
            for inner, number in group.items()
            if type(number) in (int, float)
        }
        if name != "tensorboard":
            return api.log(values, step=line["step"])
        if not writers:  # hides the steps that a resumed run makes again
            writers.append(SummaryWriter(str(Path(out) / name), purge_step=line["step"]))
        for key, value in values.items():
            writers[0].add_scalar(key, value, line["step"])
        writers[0].flush()

    return write
