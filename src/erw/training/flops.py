"""What training costs: FLOPs counted by running each kind of step once on the meta device.

A multiply-add is 2 FLOPs; matrix products, convolutions and attention count, forward and backward,
as `torch.utils.flop_counter` has them. Whatever network, projector or loss runs is counted.
"""

import functools
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from erw.align import ALIGN_LOSSES, PROJECTORS, TARGET_NORMS
from erw.config import Eval, Log, Run
from erw.data.cache import Batch, Cache
from erw.models import BACKBONES
from erw.plan import Phase, Plan
from erw.rng import Draws
from erw.training.network import build_network
from erw.training.objective import build_objective, total
from erw.training.optimizer import build_optimizer


class Spent(NamedTuple):
    """Floating-point operations so far; `warmup` and `teacher` are parts of `total`."""

    total: int
    warmup: int
    teacher: int


class Rate(NamedTuple):
    """Cost of steps start:stop per image: `trained` is forward and backward of network and
    projectors; `taught`: they read the encoder's features; `own` is the optimiser's, a step."""

    start: int
    stop: int
    warmup: bool
    trained: int
    taught: bool
    own: int = 0


@dataclass(frozen=True)
class Ledger:
    """The cost of a run by step, a function of its plan and not of its history."""

    plan: Plan
    batch_size: int
    rates: tuple[Rate, ...]  # cost per image, in the order of steps; the last goes on for ever
    # FLOPs of all encoders' forward on one image. A cache encodes each image once, so it is paid
    # for the distinct images that steps with its features have used.
    teacher: int
    rows: int  # images in the cache

    @classmethod
    def of(cls, run: Run, cache: Cache) -> "Ledger":
        """The ledger of a run that is resolved by its cache."""
        encoders = dict.fromkeys((*run.data.features, *filter(None, [run.data.class_token])))
        dims = {name: spec.dim for name, spec in cache.features.items()}
        teacher = sum(cache.features[name].flops for name in encoders)
        return cls.from_dims(run, dims, teacher=teacher, rows=cache.encoded)

    @classmethod
    def from_dims(cls, run: Run, dims: Mapping[str, int], *, teacher: int, rows: int) -> "Ledger":
        """The same from the encoders' feature widths, without a cache."""
        rates = []
        for start, stop in run.plan.segments(run.steps):
            phase = run.phase(start)
            taught = phase.reads_encoder or run.model.needs_token
            trained = step_flops(run, dims, phase)
            own = step_flops(run, dims, phase, own=True) if run.optim.name != "adamw" else 0
            rates.append(Rate(start, stop, phase.warmup, trained, taught, own))
        return cls(run.plan, run.data.batch_size, tuple(rates), teacher, rows)

    def images(self, step: int) -> int:
        """Images seen in the first `step` steps."""
        return self.plan.images(step, self.batch_size)

    def rate(self, step: int) -> Rate:
        """The cost per image of a step."""
        return next((rate for rate in self.rates if step < rate.stop), self.rates[-1])

    def spent(self, step: int) -> Spent:
        """FLOPs of the first `step` steps."""
        trained = warmup = taught = 0
        for rate in self.rates:
            stop = max(rate.start, step if rate is self.rates[-1] else min(step, rate.stop))
            images = self.images(stop) - self.images(rate.start)
            cost = images * rate.trained + (stop - rate.start) * rate.own
            trained += cost
            warmup += cost * rate.warmup
            taught += images * rate.taught
        teacher = min(taught, self.rows) * self.teacher
        return Spent(trained + teacher, warmup, teacher)

    def steps_for(self, flops: float) -> int:
        """The largest number of steps whose total cost is at most `flops`."""
        return bisect_right(range(2**40), flops, key=lambda step: self.spent(step).total) - 1


def step_flops(run: Run, dims: Mapping[str, int], phase: Phase, *, own: bool = False) -> int:
    """Forward and backward FLOPs of one image in a step of a resolved run; or the optimiser's.

    `dims`: channels of each encoder's features. Raises ConfigError as `build_optimizer`. Settings
    that cost the same, as those of seeds do, are counted once.
    """
    bare = run.replace(name="", seed=0, data=replace(run.data, cache=()), log=Log(), eval=Eval())
    # Anybody may register another part under a known name.
    known = (BACKBONES, PROJECTORS, ALIGN_LOSSES, TARGET_NORMS)
    parts = tuple(part for each in known for part in each.values())
    return _counted(bare, tuple(dims.items()), phase, own, parts)


@functools.cache
def _counted(
    run: Run, widths: tuple[tuple[str, int], ...], phase: Phase, own: bool,
    parts: tuple[Callable[..., Any], ...],
) -> int:  # fmt: skip
    dims = dict(widths)
    model = run.model
    with torch.device("meta"):
        net = build_network(run, dims)
        net.train_only(phase)
        latent = torch.zeros(1, model.channels or 0, *2 * (model.input_size or 0,))
        tokens = net.model.tokens
        batch = Batch(
            latent,
            latent,
            torch.zeros(1, dtype=torch.int64),
            tuple(torch.zeros(1, tokens, dims[name]) for name in run.data.features),
            torch.zeros(1, model.class_dim) if model.class_dim else None,
        )
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            rng = Draws(0, 0, lo=0, hi=1, device="meta")
            losses = build_objective(run)(net, batch, phase, rng, ema=net.model)
            total(losses, phase).backward()
    if own:
        optimizer = build_optimizer(net, run.optim, latent.new_zeros(()))
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    return counter.get_total_flops()
