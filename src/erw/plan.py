"""The plan of a run: which phase a step is in, what is aligned there, and what each loss weighs.

A phase is data. Warm-up and full training run through the same model, loop and objective; a
`Phase` says how deep the forward goes, which terms are active and what each loss weighs.

Source: ERW (arXiv 2504.10188), section 3.3, Eq. 13, 14 and 40.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Literal

from erw.errors import ConfigError, nearest
from erw.settings import Settings, ranged

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "half_life": lambda u: 2.0**-u,
    "exponential": lambda u: math.exp(-u),
    "cosine": lambda u: 0.5 * (1 + math.cos(math.pi * min(u, 1.0))),
    "linear": lambda u: max(0.0, 1 - u),
    "stop_at": lambda u: float(u < 1),
}
"""Name -> factor on the weight after u = k / over of the schedule; add your own here. A factor
that has fallen to 0 must stay 0."""

FOREVER = 2**40  # steps; no run is longer


@dataclass(frozen=True)
class Schedule(Settings, group="weight"):
    """A weight over k, the optimiser steps since the end of warm-up: value * factor(k / over)."""

    kind: str = "constant"  # of `SCHEDULES`
    value: float = ranged(0.5, "[0, inf)")  # the weight at k = 0
    over: int = 0  # steps that the shape takes; without effect for `constant`
    # share of `value` below which the weight is 0, so that a decaying schedule ends and the encoder
    # is no longer read
    floor: float = ranged(1e-3, "[0, inf)")

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"weight.kind is {self.kind!r}{nearest(self.kind, SCHEDULES)}")
        super().__post_init__()
        if self.kind != "constant" and self.over <= 0:
            raise ConfigError(f"weight.over is {self.over}; it needs a number of steps > 0")

    def __call__(self, k: int) -> float:
        """The weight k >= 0 steps after the end of warm-up."""
        factor = SCHEDULES[self.kind](k / self.over if self.over else 0.0)
        return self.value * factor if factor >= self.floor else 0.0

    @cached_property
    def ends(self) -> int | None:
        """The first k from which the weight is 0; None: it never is."""
        if self(FOREVER) > 0:
            return None
        return bisect_left(range(FOREVER), True, key=lambda k: self(k) <= 0)


# A schedule of each kind: half_life(2.0, over=500). ERW's released code halves over 50,000 steps;
# no version of the paper gives its exponential's. HASTE stops early.
constant = partial(Schedule, "constant")
half_life = partial(Schedule, "half_life")
exponential = partial(Schedule, "exponential")
cosine_decay = partial(Schedule, "cosine")
linear_decay = partial(Schedule, "linear")
stop_at = partial(Schedule, "stop_at")


@dataclass(frozen=True)
class Align(Settings, group="plan.align"):
    """One alignment term: the tokens after a block, projected, against a target."""

    name: str = "align"  # of its loss in metrics.jsonl; unique within a plan
    # whose output is aligned, counted from 1; in warm-up the last one that runs
    block: int = ranged(8, "[1, inf)")
    # `encoder` (all that the run reads, averaged), `encoder:NAME` (one of them, such as
    # encoder:vae:sd-vae-ft-ema), `ema` (block `target_block` of the EMA model), `block` (another
    # block, without gradient), or `none` (a loss on the tokens alone). Of encoder:NAME#attention9
    # (HASTE) the block's attention is aligned, with projector none and loss attention.
    target: str = "encoder"
    target_block: int | None = None  # of `ema` and `block`
    # of `ema`: its input has the same noise at a time earlier by up to so much, drawn anew for
    # every image (SRA has 0.2)
    earlier: float = ranged(0.0, "[0, 1]")
    # attention heads of an encoder whose attention is the target; as many first ones are compared
    # as both have
    heads: int = ranged(12, "[1, inf)")
    projector: str = "mlp"  # of `PROJECTORS`
    loss: str = "cosine"  # of `ALIGN_LOSSES`
    # of the losses that have one; None: their default
    temperature: float | None = ranged(None, "(0, inf)")
    normalize: str = "none"  # what is done to the target first, of `TARGET_NORMS`
    # share of the tokens that are compared, drawn anew for every image and step
    tokens: float = ranged(1.0, "(0, 1]")
    weight: Schedule = field(default_factory=Schedule)  # schedule in full training
    warmup_weight: float = ranged(1.0, "(0, inf)")  # weight in warm-up
    # where the term is active: `both`, `warmup` or `full`
    phase: Literal["both", "warmup", "full"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, (registry, *names) in OURS.items():
            if (value := getattr(self, key)) not in names:
                from erw import align

                known: Mapping[str, object] = getattr(align, registry)
                if value not in known:
                    raise ConfigError(f"plan.align {key} is {value!r}{nearest(value, known)}")
        if self.target.partition(":")[0] not in ("encoder", "ema", "block", "none"):
            kinds = "expected encoder, encoder:NAME, ema, block or none"
            raise ConfigError(f"plan.align target is {self.target!r}; {kinds}")
        if (self.target in ("ema", "block")) != (self.target_block is not None):
            raise ConfigError("plan.align: targets ema and block need target_block, others none")
        others = self.projector, self.normalize, self.tokens
        if self.attends != (self.loss == "attention") or self.attends > (
            others == ("none", "none", 1)
        ):
            alone = "loss attention, a target encoder:NAME#attentionBLOCK and projector none"
            raise ConfigError(f"plan.align {self.name}: {alone} go together")
        if self.earlier and self.target != "ema":
            raise ConfigError(f"plan.align {self.name}: earlier is for target ema")
        if not self.reads_encoder and self.phase != "full":
            raise ConfigError(f"plan.align target {self.target}, no encoder, needs phase full")
        if self.normalize == "images" and not self.reads_encoder:
            raise ConfigError(f"plan.align normalize images is for encoders, not {self.target}")
        if self.name in RESERVED:
            raise ConfigError(f"plan.align name {self.name!r} is taken by another loss")

    @property
    def reads_encoder(self) -> bool:
        return self.target.startswith("encoder")

    @property
    def attends(self) -> bool:
        """Whether attention is aligned, not tokens."""
        return "#attention" in self.target

    @property
    def encoder(self) -> str | None:
        """The one encoder that it is aligned with; None: all that the run reads."""
        return self.target.partition(":")[2] or None

    def encoders(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the encoders `names` whose features are its targets, attention only if named."""
        if not self.reads_encoder:
            return ()
        named = (self.encoder,) if self.encoder else None
        return named or tuple(name for name in names if "#attention" not in name)


OURS = {
    "loss": (
        "ALIGN_LOSSES",
        "cosine",
        "nt_xent",
        "nt_xent_batch",
        "nt_xent_pooled",
        "dispersive",
        "attention",
    ),
    "projector": ("PROJECTORS", "mlp", "linear", "conv", "none"),
    "normalize": ("TARGET_NORMS", "none", "tokens", "irepa", "images"),
}
"""Setting -> its registry in `erw.align`, and names that are taken without a look into it, which
imports torch."""


@dataclass(frozen=True)
class Routing(Settings, group="plan.routing"):
    """Token routing: in full training some blocks see some of the patches; in warm-up all."""

    # behind those blocks the others are what they were before (`tread`), or a mask token that is
    # fused with all from before (`sprint`; `model.fusion` has the same blocks)
    kind: Literal["none", "tread", "sprint"] = "none"
    blocks: tuple[int, int] = ranged((3, 10), "[1, inf)")  # the first and the last, counted from 1
    keep: float = ranged(0.5, "(0, 1)")  # share of the patches that they see
    # drawn anew for every image and step: of all, or one of each 2 x 2, for which `keep` is 0.25
    choose: Literal["uniform", "grid"] = "uniform"
    until: int | None = ranged(None, "[0, inf)")  # step from which they see all; none: never
    # share of images with mask tokens alone, also after `until`, for `sample.guide path`
    path_drop: float = ranged(0.0, "[0, 1)")


RESERVED = ("flow", "ddpm", "token", "direction", "internal", "contrastive", "loss")
"""Names of the other losses."""


@dataclass(frozen=True)
class Phase:
    """What one step does."""

    name: Literal["warmup", "full"] = "full"
    # what each loss weighs, by name; a loss without an entry is not computed
    weights: Mapping[str, float] = field(default_factory=lambda: {"flow": 1.0}, hash=False)
    terms: tuple[Align, ...] = ()  # active alignment terms
    stop_at: int | None = None  # the last block that runs and trains; None: all do
    first: int = 1  # the first block that trains
    unrotated: bool = False  # queries and keys without the model's rotary positions
    routing: Routing | None = None  # None: all blocks see all tokens
    path_drop: float | None = None  # share of images with mask tokens alone; None: there are none
    # the input is the clean latent at t = 0, not a noised one at a sampled time
    clean: bool = False
    unlabelled: bool = False  # every label is the null class
    lr_scale: float = 1.0  # factor on the learning rate

    @property
    def warmup(self) -> bool:
        return self.name == "warmup"

    @property
    def reads_encoder(self) -> bool:
        """Whether a step needs the encoder's features."""
        return any(term.reads_encoder for term in self.terms)

    def weight(self, name: str) -> float:
        """What a loss weighs; 0 where it is not computed."""
        return self.weights.get(name, 0.0)

    def block(self, term: Align) -> int:
        """The block whose output the term aligns."""
        return self.stop_at or term.block

    @property
    def taps(self) -> tuple[int, ...]:
        """All blocks whose output is needed."""
        targets = (term.target_block for term in self.terms if term.target == "block")
        aligned = (self.block(term) for term in self.terms if not term.attends)
        return tuple(sorted({*aligned, *filter(None, targets)}))

    @property
    def attention(self) -> tuple[int, ...]:
        """All blocks whose attention is needed."""
        return tuple(sorted({self.block(term) for term in self.terms if term.attends}))

    @property
    def trains(self) -> tuple[int, int | None, tuple[str, ...]]:
        """What decides which parameters train: the first and the last block, the active terms."""
        return self.first, self.stop_at, tuple(term.name for term in self.terms)


@dataclass(frozen=True)
class Plan(Settings):
    """From an optimiser step to its phase: `plan(step) -> Phase`."""

    # steps of phase 1 (warm-up). 0: full training from the start (REPA, SiT).
    warmup: int = ranged(0, "[0, inf)")
    # blocks of the latent-to-representation part, trained in warm-up ("ERW depth")
    depth: int = ranged(4, "[1, inf)")
    # the first block that warm-up trains: those before it stay as they begin, which changes no
    # token, so that the part that is warm lies later in the network (ERW's placements)
    warmup_first: int = ranged(1, "[1, inf)")
    # the alignment terms; none for SiT. A `Schedule` stands for one REPA term.
    align: tuple[Align, ...] = (Align(),)
    # `clean` latents at t = 0 (the paper), or `noisy` ones at the times of phase 2
    warmup_input: Literal["clean", "noisy"] = "clean"
    # `given`, or `dropped`: the null class for every image in phase 1
    warmup_label: Literal["given", "dropped"] = "given"
    # false: without the model's rotary positions, as ERW's released code has it
    warmup_rope: bool = True
    warmup_lr: float = ranged(1.0, "(0, inf)")  # factor on the learning rate in phase 1
    # images per step in phase 1; None: as in phase 2
    warmup_batch: int | None = ranged(None, "[1, inf)")
    # `keep` the projectors at the boundary, or start phase 2 with `fresh` ones
    projector: Literal["keep", "fresh"] = "keep"
    # `keep` the optimiser's moments at the boundary, or start phase 2 with `fresh` ones
    optimizer: Literal["keep", "fresh"] = "keep"
    routing: Routing = field(default_factory=Routing)  # of tokens, in phase 2

    def __post_init__(self) -> None:
        if isinstance(self.align, Schedule):
            object.__setattr__(self, "align", (Align(weight=self.align),))
        super().__post_init__()
        names = [term.name for term in self.align]
        if len(set(names)) < len(names):
            raise ConfigError(f"plan.align names its terms {', '.join(names)}: each needs its own")
        if self.warmup and not any(term.phase != "full" for term in self.align):
            raise ConfigError("plan.warmup has nothing to learn: plan.align needs a term for it")
        if self.warmup_first > self.depth:
            problem = f"plan.warmup_first {self.warmup_first} is behind plan.depth {self.depth}"
            raise ConfigError(f"{problem}: warm-up would train no block")

    def __call__(self, step: int) -> Phase:
        """The phase of optimiser step `step`, counted from 0 over both phases."""
        if step < self.warmup:
            terms = tuple(term for term in self.align if term.phase != "full")
            return Phase(
                name="warmup",
                weights={term.name: term.warmup_weight for term in terms},
                terms=terms,
                stop_at=self.depth,
                first=self.warmup_first,
                unrotated=not self.warmup_rope,
                clean=self.warmup_input == "clean",
                unlabelled=self.warmup_label == "dropped",
                lr_scale=self.warmup_lr,
            )
        weights = {"flow": 1.0}
        for term in self.align:
            if term.phase != "warmup" and (weight := term.weight(step - self.warmup)):
                weights[term.name] = weight
        terms, r = tuple(t for t in self.align if t.name in weights), self.routing
        routed = r.kind != "none" and step < (FOREVER if r.until is None else r.until)
        drop = r.path_drop if r.kind == "sprint" else None
        return Phase(weights=weights, terms=terms, routing=r if routed else None, path_drop=drop)

    def segments(self, steps: int) -> tuple[tuple[int, int], ...]:
        """Steps start:stop of the first `steps`, cut where losses or tokens computed change."""
        ends = [term.weight.ends for term in self.align]
        cuts = {0, self.warmup, steps, *(self.warmup + end for end in ends if end is not None)}
        cuts.add(self.routing.until or 0)
        return tuple(pairwise(sorted(cut for cut in cuts if cut <= steps)))

    def batch(self, step: int, batch_size: int) -> int:
        """Images in step `step` when a full step has `batch_size`."""
        return (self.warmup_batch or batch_size) if step < self.warmup else batch_size

    def images(self, step: int, batch_size: int) -> int:
        """Images seen before step `step`; the loader's position is this number and nothing else."""
        early = min(step, self.warmup)
        return early * (self.warmup_batch or batch_size) + (step - early) * batch_size

    @property
    def active(self) -> tuple[Align, ...]:
        """The terms that some step computes."""
        computed = self(0).terms + self(self.warmup).terms
        return tuple(term for term in self.align if term in computed)

    @property
    def reads_encoder(self) -> bool:
        """Whether any step uses the encoder's features."""
        return any(term.reads_encoder for term in self.active)


def repa(block: int, weight: float = 0.5) -> Plan:
    """REPA: full training with a constant alignment weight after a block."""
    return Plan(align=(Align(block=block, weight=constant(weight)),))


SIT, REPA = Plan(align=()), repa(8)  # REPA as released; B/2: block 4
# ERW, arXiv v1 (whether 4.0 decays is not stated) and v3 (its Table 4: constant).
PAPER_V1 = Plan(
    warmup=100_000, depth=4, align=(Align(block=14, loss="nt_xent", weight=constant(4.0)),)
)
PAPER_V3 = Plan(
    warmup=100_000, depth=5, align=(Align(block=18, loss="nt_xent", weight=constant(0.5)),)
)
# ERW's released defaults for SiT-XL/2 as intended: README's projection depth, bugs left out.
RELEASED = Align(block=14, weight=half_life(6.0, over=50_000), warmup_weight=0.5)
CODE_AS_RELEASED = Plan(warmup=10_000, depth=4, align=(RELEASED,), optimizer="fresh")

PRESETS = dict(
    sit=SIT, repa=REPA, paper_v1=PAPER_V1, paper_v3=PAPER_V3, code_as_released=CODE_AS_RELEASED
)
