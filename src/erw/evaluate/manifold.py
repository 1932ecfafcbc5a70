"""Precision, recall, density and coverage: k-nearest-neighbour balls around features.

A ball belongs to each feature; its radius is the distance to the k-th nearest *other* feature of
the same set. Distances are made a block of rows at a time, so memory is `rows` x N, never N x N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import DataError


class PrecisionRecall(NamedTuple):
    """Share of fake features in a real ball, share of real features in a fake ball."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Real balls that hold a fake feature, their mean over k; share of real balls that hold any."""

    density: float
    coverage: float


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int = 3, rows: int = 1024
) -> PrecisionRecall:
    """Improved precision and recall of features (N, D), (M, D); ADM takes k = 3.

    Source: Kynkäänniemi et al. (arXiv 1904.06991). A point on the ball's edge is
    inside.
    """
    real, fake = _centred(real, fake, k=k)
    real_radius, fake_radius = _radii(real, k, rows), _radii(fake, k, rows)
    in_real, in_fake = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for lo in range(0, len(fake), rows):
        squared = _squared(fake[lo : lo + rows], real)
        in_real.append((squared <= real_radius).any(1))
        in_fake |= (squared <= fake_radius[lo : lo + rows, None]).any(0)
    return PrecisionRecall(
        torch.cat(in_real).double().mean().item(), in_fake.double().mean().item()
    )


def density_coverage(
    real: Tensor, fake: Tensor, *, k: int = 5, rows: int = 1024
) -> DensityCoverage:
    """Density and coverage of features (N, D), (M, D) (Naeem et al., arXiv 2002.09797)."""
    real, fake = _centred(real, fake, k=k)
    radius = _radii(real, k, rows)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(rows):
        hits = _squared(part, real) <= radius
        inside += int(hits.sum())
        covered |= hits.any(0)
    return DensityCoverage(inside / (k * len(fake)), covered.double().mean().item())


def _centred(real: Tensor, fake: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Both in float64 about the real mean: |a|^2 + |b|^2 - 2 a.b then loses the fewest digits."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise DataError(
            f"features of shapes {tuple(real.shape)} and {tuple(fake.shape)}; "
            "expected (N, D) and (M, D)"
        )
    if not 1 <= k < min(len(real), len(fake)):
        raise DataError(
            f"k = {k} neighbours from {len(real)} and {len(fake)} features: "
            "each set needs more than k"
        )
    mean = real.double().mean(0)
    return real.double() - mean, fake.double() - mean


def _radii(x: Tensor, k: int, rows: int) -> Tensor:
    """Squared distance (N,) from each feature to its k-th nearest other one."""
    radii = []
    for lo in range(0, len(x), rows):
        squared = _squared(x[lo : lo + rows], x)
        squared.diagonal(offset=lo).fill_(torch.inf)  # a feature is not its own neighbour
        radii.append(squared.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (N, M)."""
    products = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)
