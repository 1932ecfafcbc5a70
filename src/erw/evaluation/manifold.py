"""Precision, recall, density and coverage: k-nearest-neighbour balls around features.

Each feature has a ball, whose radius is the distance to the k-th nearest *other* feature of its
set. Squared distances are float64 and made a block of rows at a time: memory is `rows` x N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from erw.errors import DataError


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
