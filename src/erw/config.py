"""The settings of a run, as frozen records. Paths are text, so that a run is JSON and back.

A `Run` is a value: `run.replace(...)` makes another; `to_dict` and `from_dict` (`erw.records`) are
exact inverses.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from erw.errors import ConfigError
from erw.flow import PathName, Prediction, Times
from erw.plan import Plan
from erw.records import at_least, between
from erw.records import from_dict as from_dict
from erw.records import nearest as nearest
from erw.records import to_dict as to_dict


@dataclass(frozen=True)
class Model:
    """A SiT. `None` means: as the cache says.

    Attributes:
        depth, width, heads: transformer blocks, channels, attention heads.
        patch: side of a patch in latent pixels.
        rope: rotary positions in every attention (EVA-02, interleaved pairs), in both phases.
        qk_norm: a norm on queries and keys, of the kind of `norm`.
        norm: before every modulation: layer (no gain), or rms with a gain, as in LightningDiT.
        mlp: gelu, or swiglu with as many weights, as in LightningDiT.
        projector: hidden width of the alignment projector.
        input_size, channels: of the latent.
        num_classes: classes; 0: unconditional.
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 2
    rope: bool = False
    qk_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    projector: int = 2048
    input_size: int | None = None
    channels: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch", "projector"):
            at_least("model", name, getattr(self, name), 1)
        if self.width % self.heads:
            raise ConfigError(
                f"model.width {self.width} is not a multiple of model.heads {self.heads}"
            )
        if self.width % 4:
            raise ConfigError(
                f"model.width {self.width} is not a multiple of 4 (sin-cos positions)"
            )
        if self.rope and (self.width // self.heads) % 4:
            raise ConfigError(
                "model.rope needs width / heads to be a multiple of 4, "
                f"got {self.width // self.heads}"
            )


@dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        cache: folder made by `erw prepare`.
        features: which encoders' features to align with; empty: all that the cache has.
        batch_size: images per optimiser step, over all ranks and micro-batches.
        class_dropout: share of labels replaced by the null class, for guidance.
    """

    cache: str = "cache"
    features: tuple[str, ...] = ()
    batch_size: int = 256
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        at_least("data", "batch_size", self.batch_size, 1)
        between("data", "class_dropout", self.class_dropout, 0.0, 1.0)


@dataclass(frozen=True)
class Flow:
    """The objective: the path from data to noise, training times, and what the network predicts.

    Attributes:
        objective: flow (SiT), or ddpm: DiT's noise prediction with learned variance on 1,000 steps
            of linear betas, for which the settings below have no other values.
        path: from data to noise; vp preserves the variance, as SiT's.
        times: training times on it.
        prediction: what the network gives.
    """

    objective: Literal["flow", "ddpm"] = "flow"
    path: PathName = "linear"
    times: Times = "uniform"
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        if self.objective == "flow":
            return
        for other in dataclasses.fields(self)[1:]:
            if getattr(self, other.name) != other.default:
                raise ConfigError(
                    f"flow.{other.name} {getattr(self, other.name)} has no meaning with "
                    f"flow.objective ddpm, whose chain is DiT's; leave it at {other.default}"
                )

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for each of the latent: DiT adds the variance."""
        return 2 if self.objective == "ddpm" else 1


@dataclass(frozen=True)
class Optim:
    """AdamW and what stands around it.

    Attributes:
        lr: learning rate; `lr_warmup` steps of a straight line from 0 come first.
        betas, weight_decay, eps: of AdamW.
        clip: largest norm of the whole gradient.
        ema: decay of the moving average of the weights.
        accumulate: micro-batches per step.
        precision: `bf16` autocast with float32 weights, or `fp32`. `auto`: bf16 where the machine
            multiplies it natively (the log says which, and why).
        compile: torch.compile of every transformer block.
    """

    lr: float = 1e-4
    lr_warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: float = 1.0
    ema: float = 0.9999
    accumulate: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"optim.{name} is {value}; expected a finite number > 0")
        at_least("optim", "lr_warmup", self.lr_warmup, 0)
        at_least("optim", "accumulate", self.accumulate, 1)
        between("optim", "weight_decay", self.weight_decay, 0.0, 1.0)
        between("optim", "ema", self.ema, 0.0, 1.0)
        for beta in self.betas:
            between("optim", "betas", beta, 0.0, 1.0)


@dataclass(frozen=True)
class Sample:
    """How images are drawn from the trained model: see `erw.generate`."""

    steps: int = 50
    solver: Literal["euler", "heun", "adams", "euler_maruyama", "ddpm", "ddim"] = "heun"
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        at_least("sample", "steps", self.steps, 1)
        between("sample", "interval", self.interval[0], 0.0, 1.0)
        between("sample", "interval", self.interval[1], self.interval[0], 1.0)


@dataclass(frozen=True)
class Log:
    """What is written, how often, in steps; `keep` is the number of newest checkpoints kept."""

    every: int = 50
    checkpoint: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("every", "checkpoint", "keep"):
            at_least("log", name, getattr(self, name), 1)


@dataclass(frozen=True)
class Eval:
    """Scores while training, of a few samples from the same seeds; they change none of its numbers.

    Attributes:
        every: steps between two scores, in full training; the last step has one too. 0: none.
        samples: images, with the seeds 0 to samples - 1 and as `sample` says, classes in turn.
        metric: as for `erw eval`; the first score that it gives decides which weights are best.
        reference: images to compare with, as for `erw eval`; none: the built-in test set, for runs
            on the built-in images.
        reference_count: how many images of a built-in reference to compose.
        weights: file of the Inception network's weights, for metrics that need them.
        vae: decoder of the samples; none: the one that the run trains with.
        keep_best: keep the EMA weights with the best score so far as best.safetensors.
    """

    every: int = 0
    samples: int = 500
    metric: tuple[str, ...] = ("fd-lite2",)
    reference: str | None = None
    reference_count: int = 2000
    weights: str | None = None
    vae: str | None = None
    keep_best: bool = True

    def __post_init__(self) -> None:
        at_least("eval", "every", self.every, 0)
        at_least("eval", "samples", self.samples, 2)
        at_least("eval", "reference_count", self.reference_count, 2)


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers.

    Attributes:
        name: of the recipe.
        seed: all randomness is a function of it.
        steps: optimiser steps, warm-up included.
    """

    name: str = "run"
    seed: int = 0
    steps: int = 400_000
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    flow: Flow = field(default_factory=Flow)
    plan: Plan = field(default_factory=Plan)
    optim: Optim = field(default_factory=Optim)
    sample: Sample = field(default_factory=Sample)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)

    def __post_init__(self) -> None:
        at_least("run", "steps", self.steps, 1)
        plan, blocks = self.plan, self.model.depth
        if plan.warmup and plan.depth > blocks:
            raise ConfigError(f"plan.depth {plan.depth} is deeper than the model's {blocks} blocks")
        if plan.align.value and plan.align_depth > blocks:
            raise ConfigError(
                f"plan.align_depth {plan.align_depth} is deeper than the model's {blocks} blocks"
            )
        solver, objective = self.sample.solver, self.flow.objective
        if (solver in ("ddpm", "ddim")) != (objective == "ddpm"):
            raise ConfigError(
                f"sample.solver {solver} cannot draw a model of flow.objective {objective}; "
                "ddpm and ddim are the solvers of ddpm, the others those of flow"
            )
        if plan.warmup > self.steps:
            raise ConfigError(
                f"plan.warmup {plan.warmup} is longer than the whole run of {self.steps} steps"
            )
        for size in (self.data.batch_size, plan.warmup_batch or self.data.batch_size):
            if size % self.optim.accumulate:
                raise ConfigError(
                    f"a batch of {size} images does not divide into {self.optim.accumulate} "
                    "micro-batches (optim.accumulate)"
                )

    def replace(self, **changes: Any) -> "Run":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
