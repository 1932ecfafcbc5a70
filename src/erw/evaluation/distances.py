"""Distances between sets of features: Fréchet and kernel (KID, CMMD); and the Inception Score.

Features x (N, D) are of real images, y (M, D) of generated ones. All in float64: the distance is a
small difference of large traces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) (sum of centred outer products) of features, float64.

    Build with `Moments.of(features)`; `a + b` is exactly the moments of both sets together.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """Moments of features (N, D)."""
        x = features.detach().double()
        mean = x.mean(0)
        x = x - mean
        return Moments(len(x), mean, x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        """Chan et al. (1979): the pairwise update of mean and scatter."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def cov(self) -> Tensor:
        """Covariance (D, D), divided by N - 1."""
        return self.scatter / (self.count - 1)

    def part(self, columns: slice) -> "Moments":
        """The moments of some of the features."""
        if columns == slice(None):
            return self
        return Moments(self.count, self.mean[columns], self.scatter[columns, columns])

    @cached_property
    def root(self) -> Tensor:
        """A square root (D, r) of the covariance, r its rank: cov = root root^T."""
        cov, rank = self.cov, self.count - 1
        if 2 * rank >= len(cov):
            return _root(cov)
        rng = torch.Generator().manual_seed(0)  # few images: decompose only their span (D, rank)
        probes = torch.randn(len(cov), rank, generator=rng, dtype=cov.dtype)
        span = torch.linalg.qr(cov @ probes).Q
        return span @ _root(span.T @ cov @ span)


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    # Eigenvalues below the rounding of the decomposition are zeros.
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def frechet(real: Moments, fake: Moments) -> float:
    """Squared Fréchet distance |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr sqrt(C1 C2) of two Gaussians.

    With C1 = R1 R1^T and C2 = R2 R2^T, tr sqrt(C1 C2) is the sum of the singular values of R1^T R2:
    exact also for singular covariances. Source: Heusel et al. (arXiv 1706.08500).
    """
    cross = torch.linalg.svdvals(real.root.T @ fake.root).sum()
    gap = (real.mean - fake.mean).square().sum()
    return (gap + real.cov.trace() + fake.cov.trace() - 2 * cross).item()


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features (N, D), (M, D) under k(a, b) = (a.b / D + 1)^3.

    One estimate over everything; it can be negative. Source: arXiv 1801.01401.
    """
    x, y, dim = x.double(), y.double(), x.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1).pow(3)

    def within(a: Tensor) -> float:
        own = (a.square().sum(1) / dim + 1).pow(3).sum().item()
        return (_total(kernel, a, a) - own) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * _total(kernel, x, y) / (len(x) * len(y))


def cmmd(x: Tensor, y: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """`scale` times the biased squared MMD of features (N, D), (M, D), Gaussian kernel of `sigma`.

    With CLIP's embeddings of length 1 this is CMMD. Pairs of an image with itself count, as in its
    released code, so it is never negative. Source: Jayasumana et al. (arXiv 2401.09603), Eq. 3.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        return squared.clamp_(min=0).div_(-2 * sigma**2).exp_()

    def mean(a: Tensor, b: Tensor) -> float:
        return _total(kernel, a, b) / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def _total(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Sum of the kernel over all pairs, 1,024 rows of x at a time."""
    return sum(kernel(part, y).sum().item() for part in x.split(1024))


def inception_score(logits: Tensor, *, split_size: int = 5000) -> float:
    """exp E KL(p(y|x) || p(y)) from logits (N, K), averaged over splits of `split_size` in order.

    As ADM's evaluator: the last split may be shorter. Source: arXiv 1606.03498.
    """
    scores = []
    for split in logits.double().split(split_size):
        log_p = split.log_softmax(-1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(-1).mean().exp())
    return torch.stack(scores).mean().item()
