"""Moving averages of a module's parameters: exponential, and with power-function profiles.

Power functions (EDM2, arXiv 2312.02696, section 3). After t updates the average is

    theta_gamma(t) = sum over tau of p(tau) theta(tau),    p(tau) ~ tau^gamma          (Eq. 121)

and is named by the standard deviation of tau / t under p:

    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))                         (Eq. 123)

It is tracked by a moving average whose decay grows, beta(t) = (1 - 1 / t)^(gamma + 1) (Eq. 127).
Averages stored at several t are mixed into any other, with the weights x whose profile is nearest
in L2: A x = b with A and b the inner products of profiles (Eq. 151, Algorithm 3).
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw.dist import local
from erw.errors import ConfigError

WIDEST = 12**-0.5  # sigma_rel of gamma = 0, the plain mean


class Ema:
    """A copy of `module` that averages its parameters in float32:

    ema <- decay * ema + (1 - decay) * parameter
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.module: Any = copy.deepcopy(module).float().requires_grad_(False).eval()
        self.tensors: dict[str, Tensor] = dict(self.module.named_parameters())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the parameters that train at present: others have not moved."""
        moving = {n: p for n, p in module.named_parameters() if p.requires_grad}
        averages = [local(self.tensors[name]) for name in moving]
        now = [local(p.detach()).float() for p in moving.values()]
        torch._foreach_lerp_(averages, now, 1 - self.decay)

    @torch.no_grad()
    def restart(self, module: nn.Module) -> None:
        """Take the parameters as they are."""
        for name, p in module.named_parameters():
            self.tensors[name].copy_(p)


class PowerEmas:
    """Averages of `module`'s parameters with power-function profiles of the widths `sigma_rels`;
    the first update takes the parameters as they are."""

    def __init__(self, module: nn.Module, sigma_rels: Sequence[float]) -> None:
        self.exponents = {sigma: exponent(sigma) for sigma in sigma_rels}
        self.tensors = {
            sigma: {name: p.detach().clone().float() for name, p in module.named_parameters()}
            for sigma in sigma_rels
        }

    @torch.no_grad()
    def update(self, module: nn.Module, t: int) -> None:
        """The update number `t`, counted from 1 (Eq. 127)."""
        now = {name: local(p.detach()).float() for name, p in module.named_parameters()}
        for sigma, gamma in self.exponents.items():
            averages = [local(self.tensors[sigma][name]) for name in now]
            beta = (1 - 1 / t) ** (gamma + 1)
            torch._foreach_lerp_(averages, list(now.values()), 1 - beta)


class Profile(NamedTuple):
    """A power function's average of `t` updates."""

    sigma_rel: float
    t: int


class Mix(NamedTuple):
    weights: Tensor  # (stored,) float64, of sum 1
    error: float  # share of the target profile's length in L2


def width(gamma: float) -> float:
    """sigma_rel of an exponent (Eq. 123)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def exponent(sigma_rel: float) -> float:
    """gamma >= 0 of a width, by bisection. Raises ConfigError unless 0 < sigma_rel <= 12^-1/2."""
    if not 1e-6 < sigma_rel <= WIDEST + 1e-9:
        raise ConfigError(f"sigma_rel is {sigma_rel}; expected a number in (0, {WIDEST:.4f}]")
    low, high = 0.0, 2 / sigma_rel
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def overlaps(rows: Sequence[Profile], columns: Sequence[Profile]) -> Tensor:
    """Inner products (rows, columns) of profiles, as densities over tau, float64 (Eq. 151).

        <a, b> = (g_a + 1) (g_b + 1) / (g_a + g_b + 1) (m / t_a)^(g_a + 1) (m / t_b)^(g_b + 1) / m

    with m = min(t_a, t_b): neither density reaches beyond its own t.
    """
    (ga, ta), (gb, tb) = (
        torch.tensor([(exponent(sigma), t) for sigma, t in profiles], dtype=torch.float64).T
        for profiles in (rows, columns)
    )
    ga, ta = ga[:, None], ta[:, None]
    least, power = torch.minimum(ta, tb), ga + gb + 1
    shares = (least / ta) ** (ga + 1) * (least / tb) ** (gb + 1) / least
    return (ga + 1) * (gb + 1) / power * shares


def mix(stored: Sequence[Profile], target: Profile) -> Mix:
    """The mix of stored averages that is nearest to the `target` profile (Algorithm 3)."""
    if target in stored:
        return Mix(torch.eye(len(stored), dtype=torch.float64)[list(stored).index(target)], 0.0)
    a, b = overlaps(stored, stored), overlaps(stored, [target])
    norm = a.diagonal().rsqrt()[:, None]  # profiles of length 1 are better conditioned
    solved = torch.linalg.lstsq(norm * a * norm.T, norm * b, driver="gelsd").solution
    weights = (norm * solved)[:, 0]
    weights = weights / weights.sum()
    length = overlaps([target], [target])[0, 0]
    distance = length - 2 * weights @ b[:, 0] + weights @ a @ weights
    return Mix(weights, math.sqrt(max(0.0, float(distance / length))))
