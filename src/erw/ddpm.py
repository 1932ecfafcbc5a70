"""DiT's diffusion: a chain of noising steps and noise prediction with learned variance.

    step 0 is the least noisy, step N - 1 the most; x_s = sqrt(abar_s) x + sqrt(1 - abar_s) eps

| symbol  | meaning                                                                | shape        |
| x       | clean latent                                                           | (B, C, H, W) |
| eps     | standard normal noise                                                  | as x         |
| step    | index into the chain, 0..N-1                                           | (B,) int64   |
| output  | the network's noise prediction, then C channels that place the         | (B, 2C, H, W)|
|         | variance between its two bounds: -1 is the lower, 1 the upper          |              |

A network is called with the step's number in the chain that it was trained on; a respaced chain
keeps those numbers in `Chain.timesteps`. The samplers' loop is in `erw.sampling.solvers`.

Sources: improved DDPM (arXiv 2102.09672), sections 2 and 3; DiT (arXiv 2212.09748), section 3.1;
DDIM (arXiv 2010.02502), Eq. 12.
"""

import math
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import ConfigError


@dataclass(frozen=True)
class Chain:
    """A noising chain's tables, float64 of shape (N,), by step.

    Attributes:
        timesteps: int64, the number of each step in the chain of training.
        beta: variance that a step adds.
        abar, abar_before: product of 1 - beta including the step, and excluding it (1 at step 0).
        clean, noise: the roots of abar and 1 - abar, the weights of the latent and of the noise.
        variance: of q(x_{s-1} | x_s, x), the lower bound of the learned one; beta is the upper.
        log_variance: its logarithm; step 0, where the variance is 0, takes that of step 1.
        mean_x, mean_x_s: the mean of q is mean_x x + mean_x_s x_s.
    """

    timesteps: Tensor
    beta: Tensor
    abar: Tensor
    abar_before: Tensor
    clean: Tensor
    noise: Tensor
    variance: Tensor
    log_variance: Tensor
    mean_x: Tensor
    mean_x_s: Tensor

    def __len__(self) -> int:
        return len(self.beta)


class Reverse(NamedTuple):
    """The network's p(x_{s-1} | x_s): mean, log variance, and the clean latent that it implies."""

    mean: Tensor
    log_variance: Tensor
    x: Tensor


class Terms(NamedTuple):
    """Losses per image (B,): the variational bound in bits per dimension, and the squared error."""

    vb: Tensor
    mse: Tensor

    @property
    def loss(self) -> Tensor:
        """DiT's objective: their sum. Only the variance learns from the bound."""
        return self.mse + self.vb


def linear_betas(steps: int = 1000) -> Tensor:
    """DDPM's noise of each step, float64 (steps,): from 0.0001 to 0.02 at 1,000 steps."""
    scale = 1000 / steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)


def chain(betas: Tensor | None = None, *, timesteps: Tensor | None = None) -> Chain:
    """The chain of `betas` (N,), default `linear_betas()`; `timesteps` defaults to 0..N-1.

    Raises ConfigError for fewer than 2 steps or a beta outside (0, 1].
    """
    beta = (linear_betas() if betas is None else betas).double()
    if len(beta) < 2 or not bool(((beta > 0) & (beta <= 1)).all()):
        raise ConfigError("a diffusion chain needs 2 steps or more, each with 0 < beta <= 1")
    abar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = beta * (1 - before) / (1 - abar)
    return Chain(
        timesteps=torch.arange(len(beta)) if timesteps is None else timesteps,
        beta=beta,
        abar=abar,
        abar_before=before,
        clean=abar.sqrt(),
        noise=(1 - abar).sqrt(),
        variance=variance,
        log_variance=torch.cat([variance[1:2], variance[1:]]).log(),
        mean_x=beta * before.sqrt() / (1 - abar),
        mean_x_s=(1 - before) * (1 - beta).sqrt() / (1 - abar),
    )


def respaced(full: Chain, count: int) -> Chain:
    """A chain of `count` evenly spaced steps of `full`, including its first and last.

    The noise between two chosen steps becomes one step's, so abar is the same at each of them.
    Raises ConfigError unless `count` is within 2..len(full).
    """
    if not 2 <= count <= len(full):
        raise ConfigError(f"{count} sampling steps; this model takes 2 to {len(full)}")
    stride = (len(full) - 1) / (count - 1)
    # Added up, not multiplied: ties then round as in the released code.
    positions = accumulate([stride] * (count - 1), initial=0.0)
    chosen = torch.tensor([round(position) for position in positions])
    abar = full.abar[chosen]
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return chain(1 - abar / before, timesteps=full.timesteps[chosen])


def step_at(t: Tensor) -> Tensor:
    """The steps (B,) of the full chain of 1,000 at times t (B,) in [0, 1].

    Step s is at t = (s + 1) / 1000. t = 0 is clean data, which has no step; it gives 0.
    """
    return ((t * 1000).round().long() - 1).clamp(min=0)


def noised(at: Chain, x: Tensor, eps: Tensor, step: Tensor) -> Tensor:
    """The clean batch x (B, ...) noised to the steps `step` (B,) with `eps`."""
    table = _at(at, step, x)
    return table.clean * x + table.noise * eps


def reverse(at: Chain, output: Tensor, x_s: Tensor, step: Tensor) -> Reverse:
    """p(x_{s-1} | x_s) given a network's `output` (B, 2C, H, W) at x_s (B, C, H, W)."""
    eps, between = output.chunk(2, dim=1)
    table = _at(at, step, x_s)
    x = (x_s - table.noise * eps) / table.clean
    upper = (between + 1) / 2
    log_variance = upper * table.beta.log() + (1 - upper) * table.log_variance
    return Reverse(table.mean_x * x + table.mean_x_s * x_s, log_variance, x)


def hybrid_terms(at: Chain, output: Tensor, x: Tensor, eps: Tensor, step: Tensor) -> Terms:
    """Improved DDPM's hybrid objective (Eq. 16) for each image, in DiT's weighting (lambda = 1).

    `output` is the network's at `noised(at, x, eps, step)`. The bound gives the noise prediction no
    gradient. At step 0 it is the likelihood of 8-bit values scaled to [-1, 1], for latents too, as
    in the released code.
    """
    x_s = noised(at, x, eps, step)
    prediction, between = output.chunk(2, dim=1)
    p = reverse(at, torch.cat([prediction.detach(), between], dim=1), x_s, step)
    table = _at(at, step, x)
    mean = table.mean_x * x + table.mean_x_s * x_s
    kl = _normal_kl(mean, table.log_variance, p.mean, p.log_variance)
    nll = -_discretised_log_likelihood(x, p.mean, p.log_variance / 2)
    bound = torch.where(_over(step == 0, x).bool(), nll, kl)
    return Terms(
        bound.flatten(1).mean(1) / math.log(2), (prediction - eps).square().flatten(1).mean(1)
    )


def ancestral_step(at: Chain, output: Tensor, x_s: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{s-1} in ancestral sampling; arguments as `reverse`."""
    p = reverse(at, output, x_s, step)
    return p.mean, (p.log_variance / 2).exp()


def ddim_step(
    at: Chain, output: Tensor, x_s: Tensor, step: Tensor, *, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{s-1} in DDIM (Eq. 12), which is 0 for `eta` 0."""
    p, table = reverse(at, output, x_s, step), _at(at, step, x_s)
    eps = (x_s - table.clean * p.x) / table.noise
    sigma = eta * table.variance.sqrt()
    mean = table.abar_before.sqrt() * p.x + (1 - table.abar_before - sigma**2).sqrt() * eps
    return mean, sigma


def _at(tables: Chain, step: Tensor, like: Tensor) -> Chain:
    """The tables at the steps of a batch, in the dtype of `like` and to broadcast over it."""
    columns = {field.name: getattr(tables, field.name) for field in fields(tables)}
    return Chain(**{k: _over(v.to(step.device)[step], like) for k, v in columns.items()})


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in the dtype of `like` (B, ...), shaped to broadcast over it."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _normal_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence in nats from one diagonal normal distribution to a second, element-wise."""
    ratio = (log_variance - log_variance2).exp()
    apart = (mean - mean2).square() * (-log_variance2).exp()
    return (log_variance2 - log_variance - 1 + ratio + apart) / 2


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 1/255 bins around x in [-1, 1] under a normal distribution.

    The outer bins are open. The normal distribution function is the released code's tanh
    approximation.
    """
    high, low = ((x - mean + side) * (-log_scale).exp() for side in (1 / 255, -1 / 255))
    below, above = _normal_cdf(low), 1 - _normal_cdf(high)
    inside = 1 - above - below
    probability = torch.where(x < -0.999, 1 - above, torch.where(x > 0.999, 1 - below, inside))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
