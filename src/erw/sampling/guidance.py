"""Guidance wraps a velocity, so solvers need not know of it.

Every kind is one formula, v_other + scale (v - v_other) at times within an interval
(arXiv 2404.07724). They differ in the other velocity:

| kind            | the other velocity is that of                   | source                   |
| classifier-free | the same model with the null class              | arXiv 2207.12598         |
| autoguidance    | a weaker model with the same class              | arXiv 2406.02507, Eq. 3  |
| representation  | the same model without its representation       | RCG, arXiv 2312.03701    |
| any other       | whatever `guided` is given                      |                          |
"""

from collections.abc import Callable

import torch
from torch import Tensor

from erw.errors import ConfigError
from erw.sampling.solvers import Velocity

ModelVelocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, t (B,), y) -> velocity."""

# A step's time that is meant to be an end of the interval may differ from it in its last bit.
_EDGE = 1e-6


def conditional(model_velocity: ModelVelocity, y: Tensor | None) -> Velocity:
    """The velocity for fixed labels or representations `y` (B, ...), without guidance."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return model_velocity(x, x.new_full((len(x),), t), y)

    return velocity


def guided(
    velocity: Velocity,
    other: Velocity,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """`velocity` guided away from `other` within `interval`, both ends included.

    Outside the interval `other` is not evaluated. Only the first `channels` are guided (None: as
    many as the state has); the rest, such as a DiT's variance, stay those of `velocity`.

    Raises ConfigError when the interval is empty or not within [0, 1], or `channels` < 1.
    """
    return _guided(velocity, lambda x, t: (velocity(x, t), other(x, t)), scale, interval, channels)


def classifier_free(
    model_velocity: ModelVelocity,
    y: Tensor,
    null: int | Tensor,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Guidance away from the model's own velocity for the null class; see `guided`.

    Inside the interval one batch of 2 B goes through the network, outside one of B. `y` (B, ...)
    holds labels or representations, `null` is the value that stands for none.
    """
    nulls = torch.as_tensor(null, dtype=y.dtype, device=y.device).expand(y.shape)
    labels = torch.cat([y, nulls])

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        doubled = torch.cat([x, x])
        v, v_null = model_velocity(doubled, doubled.new_full((len(doubled),), t), labels).chunk(2)
        return v, v_null

    return _guided(conditional(model_velocity, y), both, scale, interval, channels)


def _guided(
    plain: Velocity,
    both: Callable[[Tensor, float], tuple[Tensor, Tensor]],
    scale: float,
    interval: tuple[float, float],
    channels: int | None,
) -> Velocity:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance interval {low}..{high}: give 0 <= low <= high <= 1")
    if channels is not None and channels < 1:
        raise ConfigError(f"guidance on {channels} channels: give 1 or more, or none for all")
    if scale == 1:
        return plain

    def velocity(x: Tensor, t: float) -> Tensor:
        if not low - _EDGE <= t <= high + _EDGE:
            return plain(x, t)
        v, other = both(x, t)
        count = min(channels or x.shape[1], x.shape[1])
        mixed = other[:, :count] + scale * (v[:, :count] - other[:, :count])
        return torch.cat([mixed, v[:, count:]], dim=1) if count < v.shape[1] else mixed

    return velocity
