"""Guidance: wrap the model's velocity, so that solvers need not know of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from erw.errors import ConfigError
from erw.sample.solvers import Velocity

ModelVelocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# A step's time that is meant to be an end of the interval may differ from it in its last bit.
_EDGE = 1e-6


def conditional(model_velocity: ModelVelocity, y: Tensor | None) -> Velocity:
    """The velocity `model_velocity(x, t (B,), y)` for fixed labels `y` (B,), without guidance."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return model_velocity(x, x.new_full((len(x),), t), y)

    return velocity


def guided(
    model_velocity: ModelVelocity,
    y: Tensor,
    null: int | Tensor,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance v = v_null + scale (v_y - v_null) at times within `interval`.

    Inside the interval (both ends belong to it) one batch of 2 B goes through the network, outside
    one of B. The time that decides is that of the evaluation itself. `y` (B,) are the labels,
    `null` the class that stands for none. Sources: arXiv 2207.12598; the interval: arXiv
    2404.07724.

    Raises ConfigError when the interval is not within [0, 1] or is empty.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance interval {low}..{high}: give 0 <= low <= high <= 1")
    plain = conditional(model_velocity, y)
    if scale == 1:
        return plain
    nulls = torch.as_tensor(null, dtype=y.dtype, device=y.device).expand(y.shape)
    both = torch.cat([y, nulls])

    def velocity(x: Tensor, t: float) -> Tensor:
        if not low - _EDGE <= t <= high + _EDGE:
            return plain(x, t)
        doubled = torch.cat([x, x])
        v, v_null = model_velocity(doubled, doubled.new_full((len(doubled),), t), both).chunk(2)
        return v_null + scale * (v - v_null)

    return velocity
