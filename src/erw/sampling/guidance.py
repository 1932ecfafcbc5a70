"""Guidance wraps a velocity, so solvers need not know of it.

Every kind is one formula, v_other + scale (v - v_other) at times within an interval
(arXiv 2404.07724). They differ in the other velocity:

| kind            | the other velocity is that of                   | source                   |
| classifier-free | the same model with the null class              | arXiv 2207.12598         |
| autoguidance    | a weaker model with the same class              | arXiv 2406.02507, Eq. 3  |
| representation  | the same model without its representation       | RCG, arXiv 2312.03701    |
| path-drop       | the null class without the model's fused blocks | SPRINT, arXiv 2510.21986 |
| internal        | an earlier block's output of the same pass      | arXiv 2512.24176         |

The last is mixed where the model is evaluated (`Trained.velocity`), so that the others guide what
comes out of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from erw.sampling.solvers import Velocity

ModelVelocity = Callable[..., Tensor]
"""(x, t (B,), y, **route) -> velocity."""

_EDGE = 1e-6  # a time that is meant to be an end of the interval may differ in its last bit


def inside(t: Any, interval: tuple[float, float]) -> Any:
    """Whether times, a number or a tensor, are within the interval, both ends included."""
    return (interval[0] - _EDGE <= t) & (t <= interval[1] + _EDGE)


def conditional(model_velocity: ModelVelocity, y: Tensor | None) -> Velocity:
    """The velocity for fixed labels or representations `y` (B, ...), without guidance."""
    return lambda x, t: model_velocity(x, x.new_full((len(x),), t), y)


def guided(
    velocity: Velocity,
    other: Velocity,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    pair: Callable[[Tensor, float], tuple[Tensor, ...]] | None = None,
) -> Velocity:
    """`velocity` guided away from `other`.

    Args:
        scale: of guidance; 1: none.
        interval: the times with guidance, both ends included; elsewhere `other` is not evaluated.
        channels: only so many first ones are guided (None: as many as the state has); the rest,
            such as a DiT's variance, stay those of `velocity`.
        pair: (x, t) -> both, where one call is cheaper than two.
    """
    if scale == 1:
        return velocity

    def mixed(x: Tensor, t: float) -> Tensor:
        if not inside(t, interval):
            return velocity(x, t)
        v, w = pair(x, t) if pair else (velocity(x, t), other(x, t))
        count = min(channels or x.shape[1], x.shape[1])
        mix = w[:, :count] + scale * (v[:, :count] - w[:, :count])
        return torch.cat([mix, v[:, count:]], dim=1) if count < v.shape[1] else mix

    return mixed


def classifier_free(
    model_velocity: ModelVelocity, y: Tensor, null: int | Tensor, **options: Any
) -> Velocity:
    """Guidance away from the model's own velocity for the null class, in one batch of 2 B.

    `y` (B, ...) holds labels or representations, `null` stands for none; options as `guided`.
    """
    nulls = torch.as_tensor(null, dtype=y.dtype, device=y.device).expand(y.shape)
    plain, other, both = (
        conditional(model_velocity, labels) for labels in (y, nulls, torch.cat([y, nulls]))
    )
    pair = lambda x, t: both(torch.cat([x, x]), t).chunk(2)  # noqa: E731
    return guided(plain, other, pair=pair, **options)
