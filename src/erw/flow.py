"""Flow matching: paths from data to noise, what the network predicts, and when.

    t = 0 is data, t = 1 is noise                 (as in REPA and ERW; SiT's own files run the
    other way)

| symbol   | meaning                                  | shape        |
| x        | clean latent (z_0 in the paper)          | (B, C, H, W) |
| eps      | standard normal noise                    | as x         |
| t        | time                                     | (B,)         |
| x_t      | alpha(t) x + sigma(t) eps                | as x         |
| v        | velocity alpha'(t) x + sigma'(t) eps     | as x         |

On the linear path alpha = 1 - t and sigma = t, so v = eps - x.
Source: SiT (arXiv 2401.08740) with time reversed; ERW (arXiv 2504.10188), section 3.1 and Eq. 14.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Prediction = Literal["velocity", "x", "noise"]
Times = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Path:
    """A path x_t = alpha(t) x + sigma(t) eps with its derivatives; every field maps t to a tensor
    as t."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]


LINEAR = Path(
    name="linear",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=lambda t: torch.ones_like(t),
)
COSINE = Path(
    name="cosine",
    alpha=lambda t: torch.cos(t * math.pi / 2),
    sigma=lambda t: torch.sin(t * math.pi / 2),
    d_alpha=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
    d_sigma=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
)
PATHS = {path.name: path for path in (LINEAR, COSINE)}


class Noised(NamedTuple):
    """A noised batch: x_t, its time t (B,), the velocity that made it, and the noise in it."""

    x_t: Tensor
    t: Tensor
    velocity: Tensor
    noise: Tensor


def over(t: Tensor, like: Tensor) -> Tensor:
    """Time of shape (B,) or () shaped to broadcast over `like` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def noise(x: Tensor, eps: Tensor, t: Tensor, *, path: Path = LINEAR) -> Noised:
    """Move the clean batch `x` (B, ...) to the times `t` (B,) along `path` with the noise `eps`."""
    s = over(t, x)
    x_t = path.alpha(s) * x + path.sigma(s) * eps
    return Noised(x_t, t, path.d_alpha(s) * x + path.d_sigma(s) * eps, eps)


def target(x: Tensor, noised: Noised, prediction: Prediction) -> Tensor:
    """What the network is asked for: the velocity, the clean latent or the noise."""
    return {"velocity": noised.velocity, "x": x, "noise": noised.noise}[prediction]


def velocity_from(
    prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor, *, path: Path = LINEAR
) -> Tensor:
    """The velocity that a network's `output` stands for at (x_t, t).

    `x` and `noise` determine each other through x_t = alpha x + sigma eps; the division is by
    sigma or alpha, which is kept at least 1e-4 away from 0 at the two ends of the path.
    """
    if prediction == "velocity":
        return output
    s = over(t.to(x_t.dtype), x_t)
    alpha, sigma = path.alpha(s), path.sigma(s)
    if prediction == "x":
        x, eps = output, (x_t - alpha * output) / sigma.clamp(min=1e-4)
    else:
        x, eps = (x_t - sigma * output) / alpha.clamp(min=1e-4), output
    return path.d_alpha(s) * x + path.d_sigma(s) * eps


def score_from_velocity(v: Tensor, x_t: Tensor, t: Tensor, *, path: Path = LINEAR) -> Tensor:
    """The score grad log p_t(x_t) that belongs to a velocity (SiT, section 2.4; needs t > 0)."""
    s = over(t, x_t)
    ratio = path.alpha(s) / path.d_alpha(s)
    variance = path.sigma(s) ** 2 - ratio * path.d_sigma(s) * path.sigma(s)
    return (ratio * v - x_t) / variance


def sample_times(u: Tensor, normal: Tensor, *, times: Times, path: Path = LINEAR) -> Tensor:
    """Training times (B,) from uniform numbers `u` or standard normal ones `normal`, both (B,).

    `uniform` is t = u. `logit_normal` draws log(sigma / alpha) from a standard normal and returns
    the time with that ratio (EDM's noise levels carried over to the path, as REPA's `lognormal`).
    """
    if times == "uniform":
        return u
    ratio = normal.exp()
    if path is LINEAR:
        return ratio / (1 + ratio)
    return 2 / math.pi * torch.atan(ratio)
