"""One evaluation point: samples of the EMA model with fixed seeds, their score, picture and row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erw.encoders.vae import VAE
from erw.errors import NumericsError
from erw.sampling.generation import Generation, generate
from erw.study import measure
from erw.study.budget import Share
from erw.study.presets import StudyPlan
from erw.study.results import Row, is_warmup, mean_of, read_metrics
from erw.training.checkpoint import path_of, progress
from erw.training.trained import Trained


class Scored(NamedTuple):
    """FD-Lite2 of a model's samples, the first of them, and how they were made."""

    fd: float
    first: Tensor
    made: Generation


def scored(
    plan: StudyPlan,
    model: Trained,
    scorer: measure.Scorer,
    *,
    vae: VAE,
    tick: measure.Tick = measure.nothing,
) -> Scored:
    """Draw the plan's samples, classes in turn, and score them against the held-out images.

    Seeds and labels are the same for every method and point. `tick` hears of every image twice: as
    it is drawn and as it is scored. Raises NumericsError for a NaN score.
    """
    made = generate(
        model,
        range(plan.samples),
        steps=plan.sample_steps,
        solver=plan.solver,
        guidance=plan.guidance,
        batch_size=measure.BLOCK,
        vae=vae,
        precision="auto",
    )
    parts: list[Tensor] = []
    for part in made:
        assert part.images is not None, "a VAE was given"
        parts.append(part.images.cpu())
        tick(len(part.images))
    images = torch.cat(parts)
    fd = scorer.score(images, tick=tick)
    if not math.isfinite(fd):
        raise NumericsError(f"the score of {plan.samples} samples at step {model.step} is {fd}")
    return Scored(fd, images[: measure.GRID], made)


def row(
    method: str, seed: int, step: int, *, share: Share, folder: Path, fd: float, fraction: float
) -> Row:
    """The row of a point; its losses are means since the point before, `loss` the flow matching."""
    spent = share.ledger.spent(step)
    before = max((p for p in share.points if p < step), default=0)
    lines = [line for line in read_metrics(folder, empty=True) if before < line["step"] <= step]
    full = [line for line in lines if not is_warmup(line)]
    aligned = [line for line in lines if line.get("align_weight")]
    return Row(
        method=method,
        seed=seed,
        step=step,
        images=share.ledger.images(step),
        flops_total=spent.total,
        flops_warmup=spent.warmup,
        flops_teacher=spent.teacher,
        seconds=progress(path_of(folder / "checkpoints", step)).seconds,
        fd_lite2=fd,
        loss=mean_of(full, "flow"),
        align=mean_of(aligned, "align"),
        fraction=fraction,
    )
