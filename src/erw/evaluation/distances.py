"""Distances between sets of features: Fréchet and kernel (KID, CMMD); and the Inception Score.

| symbol | meaning                                         | shape             |
| x, y   | features of real images, of generated images    | (N, D), (M, D)    |
| mu     | mean                                            | (D,)              |
| C      | covariance, divided by N - 1 as `np.cov`        | (D, D)            |

All in float64: the distance is a small difference of large traces.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import DataError, NumericsError


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
        """Moments of features (N, D).

        Raises NumericsError for features that are not finite, DataError when there are none.
        """
        if features.ndim != 2 or not len(features):
            raise DataError(
                f"features of shape {tuple(features.shape)}; expected (N, D) with N > 0"
            )
        x = features.detach().double()
        if bad := int((~torch.isfinite(x)).any(1).sum()):
            raise NumericsError(f"features of {bad} of {len(x)} images are not finite")
        mean = x.mean(0)
        x = x - mean
        return Moments(len(x), mean, x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        """Chan et al. (1979): the pairwise update of mean and scatter."""
        if self.mean.shape != other.mean.shape:
            raise DataError(
                f"features of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged"
            )
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def cov(self) -> Tensor:
        """Covariance (D, D); raises DataError with fewer than 2 images."""
        if self.count < 2:
            raise DataError(f"{self.count} image: a covariance needs at least 2")
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
        if 2 * rank < len(cov):  # few images: decompose only their span
            rng = torch.Generator().manual_seed(0)
            probes = torch.randn(len(cov), rank, generator=rng, dtype=cov.dtype).to(cov.device)
            span = torch.linalg.qr(cov @ probes).Q  # (D, rank), the whole image of the covariance
            return span @ _root(span.T @ cov @ span)
        return _root(cov)


def frechet(real: Moments, fake: Moments) -> float:
    """Squared Fréchet distance |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr sqrt(C1 C2) of two Gaussians.

    With C1 = R1 R1^T and C2 = R2 R2^T, tr sqrt(C1 C2) is the sum of the singular values of R1^T R2.
    Unlike an iterative matrix square root this is right, real and free of a made-up epsilon also
    for singular covariances, as with fewer samples than dimensions. Each `Moments` caches its root,
    so a reference is decomposed once. Source: Heusel et al. (arXiv 1706.08500).
    """
    if real.mean.shape != fake.mean.shape:
        raise DataError(
            f"features of {len(fake.mean)} dimensions against a reference of {len(real.mean)}: "
            "made with another encoder?"
        )
    product = real.root.T @ fake.root
    cross = torch.linalg.svdvals(product).sum() if product.numel() else product.new_zeros(())
    gap = (real.mean - fake.mean).square().sum()
    return (gap + real.cov.trace() + fake.cov.trace() - 2 * cross).item()


class Interval(NamedTuple):
    """A value and its confidence bounds."""

    value: float
    low: float
    high: float


def frechet_bootstrap(
    features: Tensor,
    reference: Moments,
    *,
    resamples: int = 100,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The Fréchet distance of `features` (N, D) and its basic bootstrap interval.

    Resampling repeats images, columns raises the distance as fewer images would; the basic interval
    [2 v - q_high, 2 v - q_low] of the resampled quantiles q takes that bias out again. It covers
    the choice of images, not seeds of training.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise DataError(
            f"resamples {resamples} (>= 2) or confidence {confidence} (0..1) is impossible"
        )
    value, count = frechet(reference, Moments.of(features)), len(features)
    rng = torch.Generator().manual_seed(seed)
    draws = (torch.randint(count, (count,), generator=rng) for _ in range(resamples))
    distances = [frechet(reference, Moments.of(features[rows])) for rows in draws]
    values = torch.tensor(distances, dtype=torch.float64)
    tail = (1 - confidence) / 2
    return Interval(
        value,
        2 * value - values.quantile(1 - tail).item(),
        2 * value - values.quantile(tail).item(),
    )


def kid(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features (N, D), (M, D) under k(a, b) = (a.b / D + 1)^3.

    One estimate over everything. Its expectation is 0 for two samples of one distribution, so it
    can be negative. Source: Binkowski et al. (arXiv 1801.01401).
    """
    x, y = _pair(x, y)
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise DataError(f"{n} and {m} images: the unbiased kernel distance needs 2 of each")
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)


def cmmd(x: Tensor, y: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """`scale` times the biased squared MMD of features (N, D), (M, D), Gaussian kernel of `sigma`.

    With CLIP's embeddings of length 1 this is CMMD. As in its released code the estimate is the
    biased one, of least variance: pairs of an image with itself count, so it is never negative, and
    a set against itself gives 0. Source: Jayasumana et al. (arXiv 2401.09603), equation 3 with all
    pairs; https://github.com/google-research/google-research/tree/master/cmmd.
    """
    x, y = _pair(x, y)
    if min(len(x), len(y)) < 1:
        raise DataError(f"{len(x)} and {len(y)} images: a distance needs some of each")

    def mean(a: Tensor, b: Tensor, rows: int = 1024) -> float:
        squares, total = b.square().sum(1), 0.0
        for part in a.split(rows):
            squared = part.square().sum(1, keepdim=True) + squares - 2 * part @ b.T
            total += squared.clamp_(min=0).div_(-2 * sigma**2).exp_().sum().item()
        return total / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def inception_score(logits: Tensor, *, split_size: int = 5000) -> float:
    """exp E KL(p(y|x) || p(y)) from logits (N, K), averaged over splits of `split_size` in order.

    As ADM's evaluator: the last split may be shorter. Source: arXiv 1606.03498.
    """
    if logits.ndim != 2 or not len(logits):
        raise DataError(f"logits of shape {tuple(logits.shape)}; expected (N, K) with N > 0")
    scores = []
    for split in logits.double().split(split_size):
        log_p = split.log_softmax(-1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).sum(-1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    # Eigenvalues below the rounding of the decomposition are zeros.
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def _kernel_sum(x: Tensor, y: Tensor, rows: int = 1024) -> float:
    """Sum of the kernel over all pairs, `rows` of x at a time: memory stays at rows x M."""
    dim = x.shape[1]
    return sum((part @ y.T / dim + 1).pow(3).sum().item() for part in x.split(rows))


def _kernel_diagonal(x: Tensor) -> float:
    return (x.square().sum(1) / x.shape[1] + 1).pow(3).sum().item()


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, checked to be features (N, D), (M, D) of one encoder."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise DataError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (N, D) and (M, D)"
        )
    return x.double(), y.double()
