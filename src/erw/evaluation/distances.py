"""Distances between features of real and of generated images, and the Inception Score.

All in float64: a distance is a small difference of large traces. The ball around a feature reaches
to the k-th nearest *other* feature of its set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erw.errors import DataError


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D), the sum of centred outer products, of features; float64.
    `a + b` is exactly the moments of both sets together."""

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
        return Moments(self.count, self.mean[columns], self.scatter[columns, columns])

    @property
    def root(self) -> Tensor:
        """A square root (D, r) of the covariance, r its rank: cov = root root^T."""
        cov, rank, span = self.cov, self.count - 1, None
        if 2 * rank < len(cov):  # few images: decompose only their span (D, rank)
            rng = torch.Generator().manual_seed(0)
            probes = torch.randn(len(cov), rank, generator=rng, dtype=cov.dtype)
            span = torch.linalg.qr(cov @ probes).Q
            cov = span.T @ cov @ span
        values, vectors = torch.linalg.eigh(cov)
        # Eigenvalues below the rounding of the decomposition are zeros.
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root = vectors[:, keep] * values[keep].sqrt()
        return root if span is None else span @ root


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


def cmmd(x: Tensor, y: Tensor) -> float:
    """1,000 times the biased squared MMD of features (N, D), (M, D), Gaussian kernel, sigma 10.

    With CLIP's embeddings of length 1 this is CMMD. Pairs of an image with itself count, as in its
    released code, so it is never negative. Source: Jayasumana et al. (arXiv 2401.09603), Eq. 3.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        return squared.clamp_(min=0).div_(-2 * 10**2).exp_()

    within = _total(kernel, x, x) / len(x) ** 2 + _total(kernel, y, y) / len(y) ** 2
    return 1000 * (within - 2 * _total(kernel, x, y) / (len(x) * len(y)))


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


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int = 3, rows: int = 1024
) -> tuple[float, float]:
    """Share of fake features (M, D) in a real ball, and of real ones (N, D) in a fake ball.

    A point on a ball's edge is inside. Source: Kynkäänniemi et al. (arXiv 1904.06991).
    """
    real, fake = _centred(real, fake, k=k)
    real_edge, fake_edge = _edges(real, k, rows), _edges(fake, k, rows)
    realistic, covered = [], torch.zeros(len(real), dtype=torch.bool)
    for part, squared in _blocks(fake, real, rows):
        realistic.append((squared <= real_edge).any(1))
        covered |= (squared <= fake_edge[part, None]).any(0)
    return torch.cat(realistic).double().mean().item(), covered.double().mean().item()


def density_coverage(
    real: Tensor, fake: Tensor, *, k: int = 5, rows: int = 1024
) -> tuple[float, float]:
    """Mean number of real balls around a fake feature, over k; share of real balls with any.

    Source: Naeem et al. (arXiv 2002.09797).
    """
    real, fake = _centred(real, fake, k=k)
    edge = _edges(real, k, rows)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for _, squared in _blocks(fake, real, rows):
        hits = squared <= edge
        inside += int(hits.sum())
        covered |= hits.any(0)
    return inside / (k * len(fake)), covered.double().mean().item()


def _centred(real: Tensor, fake: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Both in float64 about the real mean: |a|^2 + |b|^2 - 2 a.b then loses the fewest digits."""
    if not k < min(len(real), len(fake)):
        raise DataError(f"{len(real)} and {len(fake)} images: {k} neighbours need more than {k}")
    mean = real.double().mean(0)
    return real.double() - mean, fake.double() - mean


def _blocks(x: Tensor, y: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows of x, their squared distances to all of y), block by block."""
    squares = y.square().sum(1)
    for lo in range(0, len(x), rows):
        part = slice(lo, lo + rows)
        squared = torch.addmm(squares, x[part], y.T, alpha=-2)
        yield part, squared.add_(x[part].square().sum(1, keepdim=True)).clamp_(min=0)


def _edges(x: Tensor, k: int, rows: int) -> Tensor:
    """Squared radius (N,) of each feature's ball and its rounding error, so that the edge is in.

    A point in the ball around r has at most the norm |r| + radius; sums round by sqrt(D) eps.
    """
    radii = torch.empty_like(x[:, 0])
    for part, squared in _blocks(x, x, rows):
        squared.diagonal(part.start).fill_(torch.inf)  # a feature is not its own neighbour
        radii[part] = squared.topk(k, dim=1, largest=False).values[:, -1]
    error = 8 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps
    return radii + error * (4 * x.square().sum(1) + radii)
