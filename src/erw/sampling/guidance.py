"""Guidance: wrap a velocity, so that solvers need not know of it.

All kinds are one formula, v_other + scale (v - v_other) at times within an interval, and differ in
what the other velocity is:

| kind            | the other velocity is that of                      | source                    |
| classifier-free | the same model, told no class                      | arXiv 2207.12598          |
| autoguidance    | a weaker model, told the same class                | arXiv 2406.02507, Eq. 3   |
| any other       | whatever `guided` is given, such as a model of no  | RCG (arXiv 2312.03701):   |
|                 | representation beside one of a representation      | representation guidance   |

The interval: arXiv 2404.07724.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from erw.errors import ConfigError
from erw.sampling.steps import Velocity

ModelVelocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Both = Callable[[Tensor, float], tuple[Tensor, Tensor]]

# A step's time that is meant to be an end of the interval may differ from it in its last bit.
_EDGE = 1e-6


def conditional(model_velocity: ModelVelocity, y: Tensor | None) -> Velocity:
    """The velocity `model_velocity(x, t (B,), y)` for fixed labels `y` (B,), without guidance."""

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
    """`velocity` guided away from `other`: v_other + scale (v - v_other) within `interval`.

    Outside the interval (both ends belong to it) `other` is not evaluated; the time that decides is
    that of the evaluation itself. `channels`: only so many of the first channels are guided; None:
    as many as the state has. The rest, such as a DiT's variance, stay those of `velocity`.

    Raises ConfigError when the interval is not within [0, 1] or is empty, or `channels` < 1.
    """
    return _guided(
        velocity,
        lambda x, t: (velocity(x, t), other(x, t)),
        scale=scale,
        interval=interval,
        channels=channels,
    )


def classifier_free(
    model_velocity: ModelVelocity,
    y: Tensor,
    null: int | Tensor,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Guidance away from the model's own velocity for no class.

    Inside the interval one batch of 2 B goes through the network, outside one of B. `y` (B,) are
    the labels, `null` the class that stands for none; the rest as in `guided`.
    """
    nulls = torch.as_tensor(null, dtype=y.dtype, device=y.device).expand(y.shape)
    labels = torch.cat([y, nulls])

    def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        doubled = torch.cat([x, x])
        v, v_null = model_velocity(doubled, doubled.new_full((len(doubled),), t), labels).chunk(2)
        return v, v_null

    plain = conditional(model_velocity, y)
    return _guided(plain, both, scale=scale, interval=interval, channels=channels)


def _guided(
    plain: Velocity,
    both: Both,
    *,
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
