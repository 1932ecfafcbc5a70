"""A process that scores and validates a run's model together with others."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from erw.config import Run
from erw.dist import World, current
from erw.evaluation.callback import scoring, validating
from erw.training import Trained, load
from erw.training.loop import Callback


def watch(run: Run, source: Path, out: Path) -> None:
    """Write the eval line and the validation line of step 12 of the run in `source` to `out`."""
    model, world = load(source), current()
    if world.first:
        out.mkdir(exist_ok=True)
        shutil.copy(source / "metrics.jsonl", out)
    for callback in (scoring(run, out), validating(run, out)):
        call(callback, out, model, world)


def call(callback: Callback, out: Path, model: Trained, world: World) -> None:
    """What the loop does with a callback after step 12."""
    for line in callback(12, model, world) or ():
        if world.first:
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 12, **line}) + "\n")


def watch_in_two(rank: int, store: str, run: Run, source: Path, out: Path) -> None:
    """`watch` in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        watch(run, source, out)
    finally:
        dist.destroy_process_group()
