"""The settings of a run, as frozen records. Paths are text, so that a run is JSON and back.

A `Run` is a value: `run.replace(...)` makes another; `to_dict` and `from_dict` (`erw.records`) are
exact inverses.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from erw.ema import exponent
from erw.errors import ConfigError
from erw.flow import PathName, Prediction, Times
from erw.plan import Plan
from erw.records import above_zero, at_least, below_one, between, finite
from erw.records import from_dict as from_dict
from erw.records import nearest as nearest
from erw.records import to_dict as to_dict
from erw.reporting import Eval as Eval
from erw.reporting import Log as Log
from erw.reporting import Sample as Sample


@dataclass(frozen=True)
class Model:
    """A SiT, or the small network of a representation diffusion model. `None`: as the cache says.

    Attributes:
        net: sit, or rdm: RCG's residual MLP that makes representations, for which `depth` and
            `width` count and the other sizes do not.
        depth, width, heads: transformer blocks, channels, attention heads.
        patch: side of a patch in latent pixels.
        rope: rotary positions in every attention (EVA-02, interleaved pairs), in both phases.
        qk_norm: a norm on queries and keys, of the kind of `norm`.
        norm: before every modulation: layer (no gain), or rms with a gain, as in LightningDiT.
        mlp: gelu, or swiglu with as many weights, as in LightningDiT.
        adaln_shift: false: the conditioning scales and gates blocks but does not shift them, as
            LightningDiT's wo_shift.
        projector: hidden width of the alignment projector.
        input_size, channels: of the latent.
        num_classes: classes; 0: unconditional, whatever labels the cache has.
        class_token: of the teacher; denoised: as one more token beside the latents (REG), or given:
            in place of the class (RCG).
        class_dim: its width.
    """

    net: Literal["sit", "rdm"] = "sit"
    depth: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 2
    rope: bool = False
    qk_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    adaln_shift: bool = True
    projector: int = 2048
    input_size: int | None = None
    channels: int | None = None
    num_classes: int | None = None
    class_token: Literal["none", "denoised", "given"] = "none"
    class_dim: int | None = None

    @property
    def needs_token(self) -> bool:
        """Whether every step reads the teacher's class token."""
        return self.net == "rdm" or self.class_token != "none"

    def __post_init__(self) -> None:
        if self.net == "rdm" and self.class_token != "none":
            raise ConfigError(
                f"model.class_token {self.class_token} is for images; an rdm makes the class token "
                "itself: leave it at none"
            )
        for name in ("depth", "width", "heads", "patch", "projector"):
            at_least("model", name, getattr(self, name), 1)
        if self.net == "sit" and self.width % self.heads:
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
        cache: folders made by `erw prepare`, or URLs of such folders; several are read as one.
        features: which encoders' features to align with; empty: all that the cache has.
        class_token: the encoder whose class token the model needs; none: the only one in the
            cache.
        batch_size: images per optimiser step, over all ranks and micro-batches.
        class_dropout: share of labels replaced by the null class, for guidance.
    """

    cache: tuple[str, ...] = ("cache",)
    features: tuple[str, ...] = ()
    class_token: str | None = None
    batch_size: int = 256
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.cache, str):
            object.__setattr__(self, "cache", (self.cache,))
        at_least("data", "batch_size", self.batch_size, 1)
        between("data", "class_dropout", self.class_dropout, 0.0, 1.0)


@dataclass(frozen=True)
class Flow:
    """The objective: the path from data to noise, training times, and what the network predicts.


    Attributes:
        objective: flow (SiT), or ddpm: DiT's noise prediction with learned variance on 1,000 steps
            of linear betas, for which the settings below have no other values.
        path: from data to noise; vp preserves the variance, as SiT's.
        times: how training times on it are drawn.
        shift: of those times: above 1 towards the noise, below 1 towards the data.
        prediction: what the network gives.
        direction: weight of 1 - cosine between predicted and true velocity, as in LightningDiT.
        token_weight: weight of the class token's loss beside the latents', where it is denoised.
    """

    objective: Literal["flow", "ddpm"] = "flow"
    path: PathName = "linear"
    times: Times = "uniform"
    shift: float = 1.0
    prediction: Prediction = "velocity"
    direction: float = 0.0
    token_weight: float = 0.03

    def __post_init__(self) -> None:
        above_zero("flow", "shift", self.shift)
        for name in ("direction", "token_weight"):
            finite("flow", name, getattr(self, name))
            between("flow", name, getattr(self, name), 0.0, math.inf)
        if self.direction and self.prediction != "velocity":
            raise ConfigError(
                f"flow.direction compares velocities, but flow.prediction is {self.prediction}"
            )
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
        ema_profiles: widths sigma_rel of power-function averages that are tracked besides, for
            `erw ema`; EDM2 has 0.05 and 0.1. Each costs 4 bytes a parameter.
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
    ema_profiles: tuple[float, ...] = ()
    accumulate: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "eps"):
            above_zero("optim", name, getattr(self, name))
        at_least("optim", "lr_warmup", self.lr_warmup, 0)
        at_least("optim", "accumulate", self.accumulate, 1)
        between("optim", "weight_decay", self.weight_decay, 0.0, 1.0)
        below_one("optim", "ema", self.ema)
        for sigma_rel in self.ema_profiles:
            exponent(sigma_rel)
        if len(set(self.ema_profiles)) < len(self.ema_profiles):
            raise ConfigError(f"optim.ema_profiles {self.ema_profiles} names a width twice")
        for beta in self.betas:
            below_one("optim", "betas", beta)


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
        if self.flow.direction and (
            self.model.class_token == "denoised" or self.model.net == "rdm"
        ):
            raise ConfigError(
                "flow.direction compares the velocities of latents alone: leave it at 0 where a "
                "class token is denoised"
            )
        if objective == "ddpm" and self.model.needs_token:
            raise ConfigError(
                "class tokens and representations are learnt by flow matching: leave "
                "flow.objective at flow"
            )
        if self.model.net == "rdm" and plan.aligns:
            raise ConfigError(
                "an rdm has no tokens to align: take the plan of SiT (--plan.warmup 0 "
                "--plan.align.value 0)"
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
