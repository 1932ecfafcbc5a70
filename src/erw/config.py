"""The settings of a run as frozen records, JSON both ways.

A `Run` is a value: `run.replace(...)` makes another. `to_dict` and `from_dict` are exact inverses,
and `from_dict` refuses an unknown key with the nearest known one. Paths are text.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from erw.errors import ConfigError, nearest
from erw.plan import Phase, Plan, Routing
from erw.settings import Settings, ranged

T = typing.TypeVar("T")

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""depth, width, heads of the published sizes of SiT."""


@dataclass(frozen=True)
class Model(Settings):
    """A SiT, or the network of a representation diffusion model. `None`: as the cache says."""

    # of `erw.models.BACKBONES`: sit, or rdm, RCG's residual MLP that makes representations, of
    # which `depth` and `width` are the only sizes
    net: str = "sit"
    depth: int = ranged(12, "[1, inf)")  # transformer blocks
    width: int = ranged(768, "[1, inf)")  # channels of a token
    heads: int = ranged(12, "[1, inf)")  # attention heads
    patch: int = ranged(2, "[1, inf)")  # side of a patch in latent pixels
    # rotary positions in every attention (EVA-02, interleaved pairs), in both phases
    rope: bool = False
    qk_norm: bool = False  # a norm on queries and keys, of the kind of `norm`
    # before every modulation: layer (no gain), or rms with a gain, as in LightningDiT
    norm: Literal["layer", "rms"] = "layer"
    # gelu, or swiglu with as many weights, as in LightningDiT
    mlp: Literal["gelu", "swiglu"] = "gelu"
    # false: the conditioning scales and gates blocks but does not shift them, as LightningDiT's
    # wo_shift
    adaln_shift: bool = True
    # first and last of the blocks whose output is fused with their input (`plan.routing` sprint)
    fusion: tuple[int, ...] = ()
    projector: int = ranged(2048, "[1, inf)")  # hidden width of the alignment projector
    # a second output layer after so many blocks, for Internal Guidance (arXiv 2512.24176); 0: none
    internal: int = ranged(0, "[0, inf)")
    # blocks of a wide head over the others, for latents of many channels (DiT^DH); 0: none
    head_depth: int = ranged(0, "[0, inf)")
    head_width: int = ranged(2048, "[1, inf)")  # channels of a token in it
    head_heads: int = ranged(16, "[1, inf)")  # attention heads in it
    input_size: int | None = ranged(None, "[1, inf)")  # side of the latent
    channels: int | None = ranged(None, "[1, inf)")  # of the latent
    num_classes: int | None = ranged(None, "[0, inf)")  # 0: unconditional, whatever the labels
    # of the teacher; denoised: as one more token beside the latents (REG), or given: in place of
    # the class (RCG)
    class_token: Literal["none", "denoised", "given"] = "none"
    class_dim: int | None = ranged(None, "[1, inf)")  # its width

    @property
    def needs_token(self) -> bool:
        """Whether every step reads the teacher's class token."""
        return self.net == "rdm" or self.class_token != "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.net == "rdm" and self.class_token != "none":
            raise ConfigError("model.class_token is for images; an rdm makes the token itself")
        for name in ("internal", "head_depth"):
            if getattr(self, name) and (self.net == "rdm" or self.class_token == "denoised"):
                problem = "is for images without a class token beside them: set it 0"
                raise ConfigError(f"model.{name} {problem}")
        if self.internal >= self.depth:
            raise ConfigError(
                f"model.internal {self.internal} is not below model.depth {self.depth}"
            )
        if self.net == "sit" and self.width % self.heads:
            raise ConfigError(f"model.width {self.width} is not a multiple of model.heads")
        if self.width % 4 or (self.rope and self.width // self.heads % 4):
            raise ConfigError(f"model.width {self.width} (with rope / heads) is no multiple of 4")
        if self.head_depth and self.head_width % (4 * self.head_heads):
            raise ConfigError(f"model.head_width {self.head_width} is no multiple of 4 head_heads")


@dataclass(frozen=True)
class Data(Settings):
    """What is read."""

    # folders made by `erw prepare`, or URLs of such folders; several are read as one
    cache: tuple[str, ...] = ("cache",)
    # which encoders' features to align with; empty: all that the cache has
    features: tuple[str, ...] = ()
    # the encoder whose class token the model needs; none: the only one in the cache
    class_token: str | None = None
    # images per optimiser step, over all ranks and micro-batches
    batch_size: int = ranged(256, "[1, inf)")
    # share of labels replaced by the null class, for guidance
    class_dropout: float = ranged(0.1, "[0, 1]")

    def __post_init__(self) -> None:
        if isinstance(typing.cast(Any, self.cache), str):
            object.__setattr__(self, "cache", (self.cache,))
        super().__post_init__()


@dataclass(frozen=True)
class Flow(Settings):
    """The objective: the path from data to noise, training times, and what the network predicts."""

    # flow (SiT), or ddpm: DiT's noise prediction with learned variance on 1,000 steps of linear
    # betas, for which the settings below have no other values
    objective: Literal["flow", "ddpm"] = "flow"
    # from data to noise; vp preserves the variance, as SiT's
    path: Literal["linear", "cosine", "vp"] = "linear"
    times: Literal["uniform", "logit_normal"] = "uniform"  # how training times on it are drawn
    # of those times: above 1 towards the noise, below 1 towards the data
    shift: float = ranged(1.0, "(0, inf)")
    prediction: Literal["velocity", "x", "noise", "score"] = "velocity"  # what the network gives
    # weight of 1 - cosine between predicted and true velocity, as in LightningDiT
    direction: float = ranged(0.0, "[0, inf)")
    # weight of the class token's loss beside the latents', where it is denoised
    token_weight: float = ranged(0.03, "[0, inf)")
    # weight of the internal output's loss, where the model has one
    internal_weight: float = ranged(0.5, "(0, inf)")
    # share of the squared distance to another image's velocity that is subtracted (contrastive
    # flow matching, arXiv 2506.05350: 0.05)
    contrastive: float = ranged(0.0, "[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("direction", "contrastive"):
            if getattr(self, name) and self.prediction != "velocity":
                raise ConfigError(f"flow.{name} compares velocities, not {self.prediction}")
        for other in dataclasses.fields(self)[1:]:
            value = getattr(self, other.name)
            if self.objective == "ddpm" and value != other.default:
                raise ConfigError(f"flow.{other.name} {value} has no meaning with objective ddpm")

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for each of the latent: DiT adds the variance."""
        return 2 if self.objective == "ddpm" else 1


LR_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda u, decay: 1.0,
    "wsd": lambda u, decay: min(1.0, (1 - u) / decay),
    "cosine": lambda u, decay: 0.5 * (1 + math.cos(math.pi * u)),
}
"""Name -> factor on the learning rate after a share u of all steps; add your own here."""


@dataclass(frozen=True)
class Optim(Settings):
    """The optimiser and what stands around it."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, adamw for the rest
    lr: float = ranged(1e-4, "(0, inf)")  # learning rate
    lr_warmup: int = ranged(0, "[0, inf)")  # steps of a straight line from 0 to `lr`
    # of `LR_SCHEDULES`, over all `steps`: constant, cosine (to 0), or wsd, a line to 0 at the end
    schedule: str = "constant"
    decay: float = ranged(0.2, "(0, 1]")  # share of the steps that the line of wsd takes
    betas: tuple[float, float] = ranged((0.9, 0.999), "[0, 1)")  # of AdamW
    momentum: float = ranged(0.95, "[0, 1)")  # of Muon
    weight_decay: float = ranged(0.0, "[0, 1]")  # decoupled from the gradient
    eps: float = ranged(1e-8, "(0, inf)")  # of AdamW
    clip: float = ranged(1.0, "(0, inf)")  # largest norm of the whole gradient
    ema: float = ranged(0.9999, "[0, 1)")  # decay of the moving average of the weights
    # widths sigma_rel of power-function averages that are tracked besides, for `erw ema`; EDM2 has
    # 0.05 and 0.1, the widest is 12^-1/2. Each costs 4 bytes a parameter.
    ema_profiles: tuple[float, ...] = ranged((), "(1e-6, 0.288675135]")
    # micro-batches per step; one process on a CPU gives each a thread, and the same bits however
    # many threads there are
    accumulate: int = ranged(1, "[1, inf)")
    # `bf16` autocast with float32 weights, or `fp32`. `auto`: bf16 where the machine multiplies it
    # natively (the log says which, and why).
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile of every transformer block
    # activation checkpointing: a block keeps its input alone and is computed again in the backward
    # pass. Far less memory for a third more FLOPs, which are not counted; the numbers stay the same
    recompute: bool = False
    # after a step whose loss or gradient is not finite, in which no weight moves: stop; skip it,
    # unless all between two lines of the log are such steps; or rewind to the newest checkpoint's
    # weights and go on with the next batch, three times at most
    on_nan: Literal["stop", "skip", "rewind"] = "stop"
    # a loss so many times the mean of the last hundred steps is such a step too; 0: none is
    spike: float = ranged(0.0, "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in LR_SCHEDULES:
            raise ConfigError(
                f"optim.schedule {self.schedule!r}{nearest(self.schedule, LR_SCHEDULES)}"
            )
        if len(set(self.ema_profiles)) < len(self.ema_profiles):
            raise ConfigError(f"optim.ema_profiles {self.ema_profiles} names a width twice")

    def lr_factor(self, step: int, steps: int) -> float:
        """Factor of warm-up line and schedule on the learning rate of step `step` of `steps`."""
        ramp = min(1.0, (step + 1) / self.lr_warmup) if self.lr_warmup else 1.0
        return ramp * LR_SCHEDULES[self.schedule](step / steps, self.decay)


@dataclass(frozen=True)
class Sample(Settings):
    """How images are drawn from the trained model: see `erw.generate`."""

    steps: int = ranged(50, "[1, inf)")  # of the solver
    # euler, heun, adams, dopri5 (ODE) or euler_maruyama (SDE); of a DiT ddpm or ddim
    solver: str = "heun"
    guidance: float = ranged(1.0, "(-inf, inf)")  # its scale; 1: none
    # away from no class with all blocks (`class`) or, which costs less, without the fused (`path`)
    guide: Literal["class", "path"] = "class"
    # times within which there is guidance; 0 is data, 1 is noise
    interval: tuple[float, float] = ranged((0.0, 1.0), "[0, 1]")
    # so many of the latent's first channels are guided; none: all
    guided_channels: int | None = ranged(None, "[1, inf)")
    # of the solver's times: above 1 more steps near the noise, below 1 near the data
    shift: float = ranged(1.0, "(0, inf)")
    # scale of guidance away from the internal output, before other guidance (Internal Guidance)
    internal: float = ranged(1.0, "(-inf, inf)")
    internal_interval: tuple[float, float] = ranged((0.0, 1.0), "[0, 1]")  # times with it
    # absolute tolerance of dopri5, which chooses its own steps
    atol: float = ranged(1e-6, "(0, inf)")
    rtol: float = ranged(1e-3, "(0, inf)")  # relative tolerance of dopri5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("interval", "internal_interval"):
            if (value := getattr(self, name))[0] > value[1]:
                raise ConfigError(f"sample.{name} is {value}; expected low <= high")


@dataclass(frozen=True)
class Grid(Settings):
    """What `erw sample --sweep` tries: each kind of guidance that the model has, with each other,
    in rounds of which each has twice the images of the one before, on fresh seeds."""

    # of guidance by classes, by the path of a model with path_drop, and by a weaker model
    scales: tuple[float, ...] = ranged((1.0, 1.25, 1.5, 2.0, 3.0), "(-inf, inf)")
    # of internal guidance, where the model has an internal output
    internals: tuple[float, ...] = ranged((1.0, 1.4, 1.8), "(-inf, inf)")
    # latest times with guidance, which begins at data
    until: tuple[float, ...] = ranged((1.0, 0.7), "(0, 1]")
    # widths sigma_rel of averages beside the run's own, which stores some for optim.ema_profiles
    ema: tuple[float, ...] = ranged((), "(0, 0.2887]")
    images: int = ranged(200, "[2, inf)")  # in the first round
    rounds: int = ranged(3, "[1, inf)")  # number of rounds
    keep: float = ranged(0.25, "(0, 1)")  # share of the settings that are tried again, two or more
    metric: str = "fd-lite2"  # one of those of `erw eval`
    # images to compare with, as for `erw eval`; none: the built-in test set
    reference: str | None = None
    # how many images of a built-in reference to compose
    reference_count: int = ranged(2000, "[2, inf)")

    def kept(self, count: int) -> int:
        """How many of so many settings go on to the next round."""
        return min(count, max(2, round(self.keep * count)))


@dataclass(frozen=True)
class Log(Settings):
    """What is written, how often, in steps."""

    every: int = ranged(50, "[1, inf)")  # lines of metrics
    checkpoint: int = ranged(1000, "[1, inf)")  # checkpoints, of which the newest `keep` are kept
    keep: int = ranged(2, "[1, inf)")  # number of checkpoints
    snapshot: int = ranged(1000, "[1, inf)")  # averages of `optim.ema_profiles`; all are kept
    # a picture of 16 samples, the same seeds each time, in previews; 0: none
    preview: int = ranged(0, "[0, inf)")
    to: str | None = None  # also log to tensorboard, trackio or wandb


@dataclass(frozen=True)
class Eval(Settings):
    """Scores and a validation loss while training; they change none of its numbers."""

    # steps between two scores, in full training; the last step has one too. 0: none.
    every: int = ranged(0, "[0, inf)")
    # images, with the seeds 0 to samples - 1 and as `sample` says, classes in turn
    samples: int = ranged(500, "[2, inf)")
    # as for `erw eval`; the first score that it gives decides which weights are best
    metric: tuple[str, ...] = ("fd-lite2",)
    # images to compare with, as for `erw eval`; none: the built-in test set, for runs on the built-
    # in images
    reference: str | None = None
    # how many images of a built-in reference to compose
    reference_count: int = ranged(2000, "[2, inf)")
    # file of the Inception network's weights, for metrics that need them
    weights: str | None = None
    vae: str | None = None  # decoder of the samples; none: the one that the run trains with
    keep_best: bool = True  # keep the EMA weights with the best score so far as best.safetensors
    # steps between two validation losses, in full training: the flow loss of held-out images at
    # fixed noise and twelve fixed times. 0: none.
    loss: int = ranged(0, "[0, inf)")
    loss_images: int = ranged(256, "[2, inf)")  # how many held-out images
    # cache of held-out images; none: held-out compositions, for runs on the built-in images
    heldout: str | None = None


@dataclass(frozen=True)
class Dist(Settings):
    """How several processes share a run; they change its numbers by rounding alone."""

    # ddp: each process has all weights. fsdp2: each keeps a share of weights, gradients, moments
    # and averages. hsdp: shares within groups of `shard_size`, which are replicas of each other
    strategy: Literal["ddp", "fsdp2", "hsdp"] = "ddp"
    shard_size: int | None = ranged(None, "[1, inf)")  # none: the processes of a machine
    # seconds that a batch, a step or a checkpoint may take before the run is taken to hang: it ends
    # with code 4 and names the processes that the others wait for; 0: any time
    patience: float = ranged(1800.0, "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size and self.strategy != "hsdp":
            raise ConfigError(f"dist.shard_size is for dist.strategy hsdp, not {self.strategy}")


@dataclass(frozen=True)
class Run(Settings):
    """Everything that decides a run's numbers."""

    name: str = "run"  # of the recipe
    seed: int = 0  # all randomness is a function of it
    steps: int = ranged(400_000, "[1, inf)")  # optimiser steps, warm-up included
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    flow: Flow = field(default_factory=Flow)
    plan: Plan = field(default_factory=Plan)
    optim: Optim = field(default_factory=Optim)
    sample: Sample = field(default_factory=Sample)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    dist: Dist = field(default_factory=Dist)

    def __post_init__(self) -> None:
        super().__post_init__()
        plan, blocks = self.plan, self.model.depth
        if plan.warmup and plan.depth > blocks:
            raise ConfigError(f"plan.depth {plan.depth} is deeper than the model's {blocks} blocks")
        for term in plan(plan.warmup).terms:
            for key in ("block", "target_block"):
                if (depth := getattr(term, key) or 0) > blocks:
                    problem = f"{key} {depth} is deeper than the model's {blocks} blocks"
                    raise ConfigError(f"plan.align {term.name}: {problem}")
        solver, objective = self.sample.solver, self.flow.objective
        if (solver in ("ddpm", "ddim")) != (objective == "ddpm"):
            which = "ddpm and ddim are for ddpm, the others for flow"
            raise ConfigError(f"sample.solver {solver} is not for objective {objective}: {which}")
        makes_tokens = self.model.needs_token and self.model.class_token != "given"
        for name in ("direction", "contrastive"):
            if getattr(self.flow, name) and makes_tokens:
                raise ConfigError(f"flow.{name} is for latents, not with class tokens: set it 0")
        if self.flow.contrastive and self.data.batch_size <= self.optim.accumulate:
            raise ConfigError("flow.contrastive needs two images a micro-batch or more")
        if objective == "ddpm" and self.model.internal:
            raise ConfigError("model.internal needs flow matching: leave flow.objective at flow")
        if objective == "ddpm" and self.model.needs_token:
            raise ConfigError("class tokens need flow matching: leave flow.objective at flow")
        if self.model.net == "rdm" and plan.active:
            raise ConfigError("an rdm has no tokens to align: take the plan of SiT (plan.align=())")
        if plan.warmup and not (plan.warmup_rope or self.model.rope):
            raise ConfigError("plan.warmup_rope false needs a model with model.rope: leave it out")
        if plan.warmup > self.steps:
            raise ConfigError(f"plan.warmup {plan.warmup} is longer than the whole run")
        for size in (self.data.batch_size, plan.warmup_batch or self.data.batch_size):
            if size % (parts := self.optim.accumulate):
                raise ConfigError(f"a batch of {size} does not divide into {parts} micro-batches")
        self._check_routing()

    def _check_routing(self) -> None:
        """Raise ConfigError unless token routing, network and sampler fit each other."""
        model, r, depth, guide = self.model, self.plan.routing, self.model.depth, self.sample.guide
        on, sprint, grid = r.kind != "none", r.kind == "sprint", r.choose == "grid"
        fusion, (first, last) = r.blocks * sprint, r.blocks if on else (1, 1)
        early = not (sprint and self.plan.warmup) or self.plan.depth < last
        side = (model.input_size or 0) // model.patch if on else 0  # 0: the cache says it later
        fits = not side or (0 < round(r.keep * side**2) < side**2 and not (grid and side % 2))
        terms = [t for t in self.plan(self.plan.warmup).terms if t.attends or t.projector == "conv"]
        whole = {model.internal, *(term.block for term in terms)} & {*range(first, last + on)}
        for demand, met in {
            "plan.routing.kind none: leave out its options, or set until 0": on or r == Routing(),
            f"plan.routing is for model.net sit, not {model.net}": model.net == "sit" or not on,
            f"plan.routing.blocks {r.blocks}, expected two of 1 to {depth}": first <= last <= depth,
            f"plan.routing.blocks {r.blocks}: attention, conv and internal need all": not whole,
            f"model.fusion is {model.fusion}, plan.routing needs {fusion}": model.fusion == fusion,
            "plan.routing.path_drop is for kind sprint; set it 0": sprint or not r.path_drop,
            "sample.guide path needs plan.routing.path_drop": guide == "class" or r.path_drop,
            f"plan.depth {self.plan.depth} reaches the fusion of sprint after block {last}": early,
            f"plan.routing.keep {r.keep}, with choose grid it is 0.25": not grid or r.keep == 0.25,
            f"plan.routing cannot keep {r.keep} of {side} x {side} patches by {r.choose}": fits,
        }.items():
            if not met:
                raise ConfigError(demand)

    def phase(self, step: int) -> Phase:
        """The plan's phase of a step, its losses and their weights those of the run's objective."""
        phase = self.plan(step)
        if "flow" not in phase.weights:
            return phase
        weights = {**phase.weights}
        full: dict[str, float] = {self.flow.objective: weights.pop("flow")}
        if self.model.class_token == "denoised":
            full["token"] = self.flow.token_weight
        if self.flow.direction:
            full["direction"] = self.flow.direction
        if self.model.internal:
            full["internal"] = self.flow.internal_weight
        if self.flow.contrastive:
            full["contrastive"] = -self.flow.contrastive
        return dataclasses.replace(phase, weights=full | weights)

    def replace(self, **changes: Any) -> "Run":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def to_dict(record: Any) -> dict[str, Any]:
    """A settings record as plain JSON values."""
    return dataclasses.asdict(record)


def from_dict(kind: type[T], values: dict[str, Any], *, where: str = "", strict: bool = True) -> T:
    """The settings record of type `kind` from plain JSON values; the inverse of `to_dict`.

    Raises ConfigError: an unknown key (the nearest known one is named; unless `strict` it is left
    out) or a value of the wrong type.
    """
    if kind is Plan and "align_depth" in values:  # of erw 0.1: sampling needs no plan
        values = {"align": ()}
    if kind is Data:
        values = {k: v for k, v in values.items() if k != "window"}  # of erw 0.1
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if strict and (unknown := [key for key in values if key not in known]):
        raise ConfigError(f"unknown setting {where}{unknown[0]}{nearest(unknown[0], known)}")
    some = {k: v for k, v in values.items() if k in known}
    return kind(**{k: checked(hints[k], v, f"{where}{k}", strict) for k, v in some.items()})


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, those of a list of records by their index."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        items = list(enumerate(value))
    else:
        value = list(value) if isinstance(value, tuple) else value
        return {prefix.removesuffix("."): value}
    return {k: v for key, item in items for k, v in flat(item, f"{prefix}{key}.").items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings, nested or flat, that are not the same, as "optim.lr (0.0001, now 0.0002)"."""
    before, after = flat(old), flat(new)
    return [
        f"{key} ({before.get(key)}, now {after.get(key)})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def checked(hint: Any, value: Any, where: str, strict: bool = True) -> Any:
    """A JSON value as the type `hint`. Raises ConfigError for another (see `from_dict`)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, where=f"{where}.", strict=strict)
    if hasattr(hint, "_fields") and isinstance(value, list | dict):  # a named tuple
        items = (
            value
            if isinstance(value, list)
            else [(hint._field_defaults | value)[name] for name in hint._fields]
        )
        pairs = zip(typing.get_type_hints(hint).values(), items, strict=True)
        return hint(*(checked(*pair, where, strict) for pair in pairs))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]  # of which the last may be a list
        return checked(kinds[-isinstance(value, list | tuple)], value, where, strict)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(map(repr, args))}")
        return value
    if isinstance(value, str) and args == (str, ...):
        return (value,)
    if origin is dict and isinstance(value, dict):
        return {k: checked(args[1], v, f"{where}.{k}", strict) for k, v in value.items()}
    if origin in (tuple, list) and isinstance(value, list | tuple):
        inner = args if origin is tuple and Ellipsis not in args else args[:1] * len(value)
        if len(inner) == len(value):
            return origin(checked(*pair, where, strict) for pair in zip(inner, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")
