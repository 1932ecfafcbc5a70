"""DiT's diffusion: a chain of noising steps and noise prediction with learned variance.

    step 0 is the least noisy, step N - 1 the most; x_s = sqrt(abar_s) x + sqrt(1 - abar_s) eps

A network's output (B, 2C, H, W) is the noise prediction, then C channels that place the variance
between its two bounds: -1 is the lower, 1 the upper.

Sources: improved DDPM (arXiv 2102.09672), sections 2 and 3; DiT (arXiv 2212.09748), section 3.1;
DDIM (arXiv 2010.02502), Eq. 12.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import ConfigError
from erw.flow import over


class Chain(NamedTuple):
    """A noising chain's tables, float64 of shape (N,), by step."""

    timesteps: Tensor  # int64, the number of each step in the chain of training
    beta: Tensor  # variance that a step adds
    abar: Tensor  # product of 1 - beta
    abar_before: Tensor  # the same without the step itself, 1 at step 0
    clean: Tensor  # sqrt(abar), the weight of the latent
    noise: Tensor  # sqrt(1 - abar), the weight of the noise
    variance: Tensor  # of q(x_{s-1} | x_s, x): the learned one's lower bound, as beta is its upper
    log_variance: Tensor  # step 0, where the variance is 0, takes that of step 1
    mean_x: Tensor  # the mean of q is mean_x x + mean_x_s x_s
    mean_x_s: Tensor


class Terms(NamedTuple):
    """Losses per image (B,)."""

    vb: Tensor  # the variational bound in bits per dimension
    mse: Tensor


def chain(beta: Tensor | None = None, *, timesteps: Tensor | None = None) -> Chain:
    """The chain of `beta` (N,), default DDPM's 1,000 steps; `timesteps` defaults to 0..N-1."""
    if beta is None:
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
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
    """A chain of `count` evenly spaced steps of `full`, including its first and last."""
    most = len(full.beta)
    if not 2 <= count <= most:
        raise ConfigError(f"steps is {count}; a DiT takes 2 to {most}")
    strides = [(most - 1) / (count - 1)] * (count - 1)
    # Added up, not multiplied: ties then round as in the released code.
    chosen = torch.tensor([round(position) for position in accumulate(strides, initial=0.0)])
    abar = full.abar[chosen]
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return chain(1 - abar / before, timesteps=full.timesteps[chosen])


def step_at(t: Tensor) -> Tensor:
    """The steps (B,) of the full chain at times t (B,): s is at (s + 1) / 1000, 0 also at t = 0."""
    return ((t * 1000).round().long() - 1).clamp(min=0)


def noised(at: Chain, x: Tensor, eps: Tensor, step: Tensor) -> Tensor:
    """The clean batch x (B, ...) noised to the steps `step` (B,) with `eps`."""
    table = _at(at, step, x)
    return table.clean * x + table.noise * eps


def reverse(at: Chain, output: Tensor, x_s: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log variance of p(x_{s-1} | x_s), and the clean latent, by a network's `output`."""
    eps, between = output.chunk(2, dim=1)
    table = _at(at, step, x_s)
    x = (x_s - table.noise * eps) / table.clean
    upper = (between + 1) / 2
    log_variance = upper * table.beta.log() + (1 - upper) * table.log_variance
    return table.mean_x * x + table.mean_x_s * x_s, log_variance, x


def hybrid_terms(at: Chain, output: Tensor, x: Tensor, eps: Tensor, step: Tensor) -> Terms:
    """Improved DDPM's hybrid objective (Eq. 16) of each image, for the network's `output` at
    `noised(at, x, eps, step)`.

    At step 0 the bound is the likelihood of 8-bit values, for latents too, as in the released code.
    """
    x_s = noised(at, x, eps, step)
    prediction, between = output.chunk(2, dim=1)
    fixed = torch.cat([prediction.detach(), between], dim=1)  # only the variance learns from it
    mean, log_variance, _ = reverse(at, fixed, x_s, step)
    table = _at(at, step, x)
    apart = (table.mean_x * x + table.mean_x_s * x_s - mean).square() * (-log_variance).exp()
    ratio = (table.log_variance - log_variance).exp()
    kl = (log_variance - table.log_variance - 1 + ratio + apart) / 2
    nll = -_discretised_log_likelihood(x, mean, log_variance / 2)
    bound = torch.where(over(step == 0, x), nll, kl)
    mse = (prediction - eps).square().flatten(1).mean(1)
    return Terms(bound.flatten(1).mean(1) / math.log(2), mse)


def ancestral_step(at: Chain, output: Tensor, x_s: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{s-1} in ancestral sampling; arguments as `reverse`."""
    mean, log_variance, _ = reverse(at, output, x_s, step)
    return mean, (log_variance / 2).exp()


def ddim_step(
    at: Chain, output: Tensor, x_s: Tensor, step: Tensor, *, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x_{s-1} in DDIM (Eq. 12), which is 0 for `eta` 0."""
    (_, _, x), table = reverse(at, output, x_s, step), _at(at, step, x_s)
    eps = (x_s - table.clean * x) / table.noise
    sigma = eta * table.variance.sqrt()
    mean = table.abar_before.sqrt() * x + (1 - table.abar_before - sigma**2).sqrt() * eps
    return mean, sigma


def _at(tables: Chain, step: Tensor, like: Tensor) -> Chain:
    """The tables at the steps of a batch, in the dtype of `like` and to broadcast over it."""
    return Chain(*(over(v.to(step.device)[step].to(like.dtype), like) for v in tables))


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 1/255 bins around x in [-1, 1] under a normal distribution; the outer
    bins are open."""
    high, low = ((x - mean + side) * (-log_scale).exp() for side in (1 / 255, -1 / 255))
    below, above = _normal_cdf(low), 1 - _normal_cdf(high)
    inside = 1 - above - below
    probability = torch.where(x < -0.999, 1 - above, torch.where(x > 0.999, 1 - below, inside))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The released code's approximation."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
