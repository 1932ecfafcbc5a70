"""A process that scores and validates a run's model together with others."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from erw.config import Run
from erw.dist import current
from erw.evaluation.callback import scoring
from erw.evaluation.validation import validating
from erw.training import load


def watch(run: Run, source: Path, out: Path) -> None:
    """Write the eval line and the validation line of step 12 of the run in `source` to `out`."""
    model, world = load(source), current()
    if world.first:
        out.mkdir(exist_ok=True)
        shutil.copy(source / "metrics.jsonl", out)
    for callback in (scoring(run, out), validating(run, out)):
        callback(12, model, world)


def watch_in_two(rank: int, store: str, run: Run, source: Path, out: Path) -> None:
    """`watch` in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        watch(run, source, out)
    finally:
        dist.destroy_process_group()
