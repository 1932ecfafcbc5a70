"""Flow matching: paths from data to noise, what the network predicts, and when.

    t = 0 is data, t = 1 is noise           (as in REPA and ERW; SiT's own files run the other way)

    x (B, C, H, W) clean latent     eps noise     t (B,) time
    x_t = alpha(t) x + sigma(t) eps     v = alpha'(t) x + sigma'(t) eps, the velocity

On the linear path alpha = 1 - t and sigma = t, so v = eps - x. The variance-preserving path is
SiT's: alpha = exp(-int beta / 2) with beta(t) = 0.1 + 19.9 t and sigma^2 = 1 - alpha^2.
Source: SiT (arXiv 2401.08740) with time reversed; ERW (arXiv 2504.10188), section 3.1 and Eq. 14.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Prediction = Literal["velocity", "x", "noise", "score"]
PathName = Literal["linear", "cosine", "vp"]
Times = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Path:
    """A path x_t = alpha(t) x + sigma(t) eps, its derivatives, and the time of a sigma / alpha."""

    name: PathName
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]


LINEAR = Path(
    name="linear",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=lambda t: torch.ones_like(t),
    time=lambda ratio: ratio / (1 + ratio),
)
COSINE = Path(
    name="cosine",
    alpha=lambda t: torch.cos(t * math.pi / 2),
    sigma=lambda t: torch.sin(t * math.pi / 2),
    d_alpha=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
    d_sigma=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
    time=lambda ratio: 2 / math.pi * torch.atan(ratio),
)

BETA = (0.1, 20.0)  # noise rate of the variance-preserving path at t = 0 and t = 1


def _beta(t: Tensor) -> Tensor:
    return BETA[0] + (BETA[1] - BETA[0]) * t


def _log_alpha(t: Tensor) -> Tensor:
    return -((BETA[1] - BETA[0]) / 4 * t + BETA[0] / 2) * t


def _vp_time(ratio: Tensor) -> Tensor:
    a, b, c = (BETA[1] - BETA[0]) / 4, BETA[0] / 2, torch.log1p(ratio**2) / 2  # a t^2 + b t = c
    return (2 * c / (b + (b**2 + 4 * a * c).sqrt())).clamp(max=1.0)


VP: Path = Path(
    name="vp",
    alpha=lambda t: _log_alpha(t).exp(),
    sigma=lambda t: (-torch.expm1(2 * _log_alpha(t))).sqrt(),
    d_alpha=lambda t: -_beta(t) / 2 * _log_alpha(t).exp(),
    d_sigma=lambda t: _beta(t) / 2 * (2 * _log_alpha(t)).exp() / VP.sigma(t),
    time=_vp_time,
)
PATHS = {path.name: path for path in (LINEAR, COSINE, VP)}


class Noised(NamedTuple):
    """A noised batch: x_t, its time t (B,), the velocity that made it, and the noise in it."""

    x_t: Tensor
    t: Tensor
    velocity: Tensor
    noise: Tensor


def over(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,) or () shaped to broadcast over `like` (B, ...)."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def noise(x: Tensor, eps: Tensor, t: Tensor, *, path: Path = LINEAR) -> Noised:
    """Move the clean batch `x` (B, ...) to the times `t` (B,) along `path` with the noise `eps`."""
    s = over(t, x)
    x_t = path.alpha(s) * x + path.sigma(s) * eps
    return Noised(x_t, t, path.d_alpha(s) * x + path.d_sigma(s) * eps, eps)


def residual(
    prediction: Prediction, output: Tensor, x: Tensor, noised: Noised, *, path: Path = LINEAR
) -> Tensor:
    """What training squares: a network's `output` less the velocity, the clean latent or the noise.

    The score is -eps / sigma; its residual is weighed by sigma, as in SiT: finite towards t = 0.
    """
    if prediction == "score":
        return path.sigma(over(noised.t, x)) * output + noised.noise
    return output - {"velocity": noised.velocity, "x": x, "noise": noised.noise}[prediction]


def ends(prediction: Prediction, path: Path = LINEAR) -> tuple[float, float]:
    """The lowest and highest time at which a prediction gives the velocity (SiT's margins).

    At t = 1 of the linear and cosine paths alpha = 0: neither noise nor score determine the data.
    At t = 0 sigma = 0: the clean latent does not determine the noise, and the velocity of the
    variance-preserving path has no limit.
    """
    low = 0.0 if prediction == "velocity" and path is not VP else 1e-3
    high = 1 - 1e-3 if prediction in ("noise", "score") and path is not VP else 1.0
    return low, high


def velocity_from(
    prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor, *, path: Path = LINEAR
) -> Tensor:
    """The velocity that a network's `output` stands for at (x_t, t).

    Of x, the noise and x_t = alpha x + sigma eps any two tell the third, and score = -eps / sigma:

        v = alpha' / alpha x_t + (sigma' - alpha' / alpha sigma) eps
          = sigma' / sigma x_t + (alpha' - sigma' / sigma alpha) x

    Beyond `ends`, where a ratio runs off, its value there is taken.
    """
    if prediction == "velocity":
        return output
    s = over(t.to(x_t.dtype).clamp(*ends(prediction, path)), x_t)
    alpha, sigma = path.alpha(s), path.sigma(s)
    if prediction == "x":
        ratio = path.d_sigma(s) / sigma
        return ratio * x_t + (path.d_alpha(s) - ratio * alpha) * output
    eps = output if prediction == "noise" else -sigma * output
    ratio = path.d_alpha(s) / alpha
    return ratio * x_t + (path.d_sigma(s) - ratio * sigma) * eps


def score_from_velocity(v: Tensor, x_t: Tensor, t: Tensor, *, path: Path = LINEAR) -> Tensor:
    """The score grad log p_t(x_t) that belongs to a velocity (SiT, section 2.4; needs t > 0)."""
    s = over(t, x_t)
    ratio = path.alpha(s) / path.d_alpha(s)
    variance = path.sigma(s) ** 2 - ratio * path.d_sigma(s) * path.sigma(s)
    return (ratio * v - x_t) / variance


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards the noise by `shift` > 1, towards the data by one below 1:

        t -> s t / (1 + (s - 1) t)                                  (SD3, arXiv 2403.03206, Eq. 23)

    LightningDiT's time runs from noise to data: its `timestep_shift` of 0.3 is s = 1 / 0.3 here.
    """
    return t if shift == 1 else t / (t + (1 - t) / shift)  # exact at both ends


def sample_times(
    u: Tensor, normal: Tensor, *, times: Times, path: Path = LINEAR, shift: float = 1.0
) -> Tensor:
    """Training times (B,): `u` (uniform), or those with log(sigma / alpha) = `normal`; shifted."""
    t = shifted(u if times == "uniform" else path.time(normal.exp()), shift)
    return t.clamp(min=1e-5) if path is VP else t  # where its velocity has no limit


def direction_loss(output: Tensor, velocity: Tensor) -> Tensor:
    """Mean of 1 - cosine of two velocities (B, C, ...) over channels (arXiv 2501.01423)."""
    return (1 - torch.nn.functional.cosine_similarity(output, velocity, dim=1)).mean()
