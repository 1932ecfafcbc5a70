"""The plan of a run: which phase a step is in, and what each loss weighs there.

A phase is data. Warm-up and full training run through the same model, loop and step; a `Phase`
says how deep the forward goes, which block is aligned, what is fed in and what each loss weighs.

Source: ERW (arXiv 2504.10188), section 3.3, Eq. 13, 14 and 40.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from erw.errors import ConfigError

Kind = Literal["constant", "half_life", "exponential", "cosine", "linear", "stop_at"]


@dataclass(frozen=True)
class Schedule:
    """An alignment weight over k, the optimiser steps since the end of warm-up.

    Attributes:
        kind: its shape, see `__call__`.
        value: the weight at k = 0.
        over: the steps that the shape takes; without effect for `constant`.
    """

    kind: Kind = "constant"
    value: float = 0.5
    over: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ConfigError(f"align.value is {self.value}; expected a finite number >= 0")
        if self.kind != "constant" and self.over <= 0:
            raise ConfigError(
                f"align.over is {self.over}; {self.kind!r} needs a number of steps > 0"
            )

    def __call__(self, k: int) -> float:
        """The weight k >= 0 steps after the end of warm-up."""
        if self.kind == "constant":
            return self.value
        u = k / self.over
        if self.kind == "half_life":
            return self.value * 2.0**-u
        if self.kind == "exponential":
            return self.value * math.exp(-u)
        if self.kind == "cosine":
            return self.value * 0.5 * (1 + math.cos(math.pi * min(u, 1.0)))
        if self.kind == "linear":
            return self.value * max(0.0, 1 - u)
        return self.value if u < 1 else 0.0


def constant(value: float) -> Schedule:
    """The same weight throughout (REPA: 0.5)."""
    return Schedule("constant", value)


def half_life(value: float, *, over: int) -> Schedule:
    """value * 2^(-k / over); ERW's released code has over = 50,000."""
    return Schedule("half_life", value, over)


def exponential(value: float, *, over: int) -> Schedule:
    """value * exp(-k / over), the paper's form; tau = over is given in no version of it."""
    return Schedule("exponential", value, over)


def cosine_decay(value: float, *, over: int) -> Schedule:
    """Half a cosine from value to 0 over `over` steps, then 0."""
    return Schedule("cosine", value, over)


def linear_decay(value: float, *, over: int) -> Schedule:
    """A straight line from value to 0 over `over` steps, then 0."""
    return Schedule("linear", value, over)


def stop_at(value: float, *, over: int) -> Schedule:
    """value for `over` steps, then 0 (HASTE's early stop)."""
    return Schedule("stop_at", value, over)


@dataclass(frozen=True)
class Phase:
    """What one step does.

    Attributes:
        name: `warmup` or `full`.
        stop: True: the forward ends after block `at`; later blocks do not run and do not train.
        at: the block whose output is aligned, counted from 1.
        flow_weight, align_weight: what each loss weighs; at 0 the loss is not computed.
        clean: True: the input is the clean latent at t = 0; False: a noised one at a sampled time.
        unlabelled: True: every label is the null class.
        lr_scale: factor on the learning rate.
    """

    name: Literal["warmup", "full"]
    stop: bool
    at: int
    flow_weight: float
    align_weight: float
    clean: bool = False
    unlabelled: bool = False
    lr_scale: float = 1.0

    @property
    def warmup(self) -> bool:
        return self.name == "warmup"

    @property
    def trains(self) -> tuple[bool, int, bool]:
        """What decides which parameters train: early stop, tapped block, alignment or not."""
        return self.stop, self.at, self.align_weight > 0


@dataclass(frozen=True)
class Plan:
    """From an optimiser step to its phase: `plan(step) -> Phase`.

    Attributes:
        warmup: steps of phase 1 (warm-up). 0: full training from the start (REPA, SiT).
        depth: blocks of the latent-to-representation part, trained in warm-up ("ERW depth").
        align: alignment weight in phase 2 over the steps since the end of warm-up.
        align_depth: block that is aligned in phase 2 ("projection depth").
        loss: `cosine` (both released codes) or `nt_xent` (the papers; see `erw.nt_xent`).
        temperature, negatives: of `nt_xent`, without effect for `cosine`.
        warmup_weight: weight of the alignment loss in phase 1.
        warmup_input: `clean` latents at t = 0 (the paper), or `noisy` ones at the times of phase 2.
        warmup_label: `given`, or `dropped`: the null class for every image in phase 1.
        warmup_lr: factor on the learning rate in phase 1.
        warmup_batch: images per step in phase 1; None: as in phase 2.
        projector: `keep` the projector at the boundary, or start phase 2 with a `fresh` one.
        optimizer: `keep` the optimiser's moments at the boundary, or start phase 2 with `fresh`
            ones.
    """

    warmup: int = 0
    depth: int = 4
    align: Schedule = field(default_factory=lambda: Schedule("constant", 0.5))
    align_depth: int = 8
    loss: Literal["cosine", "nt_xent"] = "cosine"
    temperature: float = 0.1
    negatives: Literal["image", "batch", "pooled"] = "image"
    warmup_weight: float = 1.0
    warmup_input: Literal["clean", "noisy"] = "clean"
    warmup_label: Literal["given", "dropped"] = "given"
    warmup_lr: float = 1.0
    warmup_batch: int | None = None
    projector: Literal["keep", "fresh"] = "keep"
    optimizer: Literal["keep", "fresh"] = "keep"

    def __post_init__(self) -> None:
        for name, low in (("warmup", 0), ("depth", 1), ("align_depth", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"plan.{name} is {getattr(self, name)}; expected {low} or more")
        for name in ("temperature", "warmup_weight", "warmup_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"plan.{name} is {value}; expected a finite number > 0")
        if self.warmup_batch is not None and self.warmup_batch < 1:
            raise ConfigError(f"plan.warmup_batch is {self.warmup_batch}; expected 1 or more")

    def __call__(self, step: int) -> Phase:
        """The phase of optimiser step `step`, counted from 0 over both phases."""
        if step < self.warmup:
            return Phase(
                name="warmup",
                stop=True,
                at=self.depth,
                flow_weight=0.0,
                align_weight=self.warmup_weight,
                clean=self.warmup_input == "clean",
                unlabelled=self.warmup_label == "dropped",
                lr_scale=self.warmup_lr,
            )
        weight = self.align(step - self.warmup)
        return Phase("full", False, self.align_depth, flow_weight=1.0, align_weight=weight)

    def batch(self, step: int, batch_size: int) -> int:
        """Images in step `step` when a full step has `batch_size`."""
        return (self.warmup_batch or batch_size) if step < self.warmup else batch_size

    def images(self, step: int, batch_size: int) -> int:
        """Images seen before step `step`; the loader's position is this number and nothing else."""
        early = min(step, self.warmup)
        return early * (self.warmup_batch or batch_size) + (step - early) * batch_size

    @property
    def aligns(self) -> bool:
        """Whether any step uses the encoder's features."""
        return self.warmup > 0 or self.align.value > 0


SIT = Plan(align=constant(0.0))
"""SiT: full training without alignment."""

REPA = Plan(align=constant(0.5), align_depth=8)
"""REPA as released: constant weight 0.5 after block 8 (B/2: block 4)."""

PAPER_V1 = Plan(
    warmup=100_000, depth=4, align=constant(4.0), align_depth=14, loss="nt_xent", negatives="image"
)
"""ERW, arXiv v1: depth 4, projection depth 14, weight 4.0 (decayed or not: not said)."""

PAPER_V3 = Plan(
    warmup=100_000, depth=5, align=constant(0.5), align_depth=18, loss="nt_xent", negatives="image"
)
"""ERW, arXiv v3: depth 5, projection depth 18, weight 0.5 (its Table 4 says constant)."""

CODE_AS_RELEASED = Plan(
    warmup=10_000,
    depth=4,
    align=half_life(6.0, over=50_000),
    align_depth=14,
    warmup_weight=0.5,
    optimizer="fresh",
)
"""ERW's released defaults for SiT-XL/2 as meant: README's projection depth, bugs left out."""

PRESETS = {
    "sit": SIT,
    "repa": REPA,
    "paper_v1": PAPER_V1,
    "paper_v3": PAPER_V3,
    "code_as_released": CODE_AS_RELEASED,
}
