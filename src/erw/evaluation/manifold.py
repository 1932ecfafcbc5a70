"""Precision, recall, density and coverage: k-nearest-neighbour balls around features.

A ball belongs to each feature; its radius is the distance to the k-th nearest *other* feature of
the same set. Distances are made a block of rows at a time, so memory is `rows` x N, never N x N.

On a CPU most of the work is in float32 and the outcome is that of float64: a distance in float32 is
known up to a bound, and rows with a comparison that lies within it are made again in float64.
"""

from collections.abc import Iterator
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
    real_set, fake_set = _sets(real, fake, k=k)
    real_radius, fake_radius = _radii(real_set, k, rows), _radii(fake_set, k, rows)
    # By how much the distance to the nearest ball's centre exceeds its radius: a squared distance
    # is |f|^2 + |r|^2 - 2 f.r, and what does not vary along a minimum is added after it.
    beyond_real = torch.empty_like(fake_set.quick[:, 0])
    beyond_fake = torch.full_like(real_set.quick[:, 0], torch.inf)
    columns = (real_set.norm.square() - real_radius).to(beyond_real.dtype)
    own = (fake_set.norm.square() - fake_radius).to(beyond_real.dtype)
    for lo in range(0, len(fake), rows):
        part = slice(lo, lo + rows)
        sums = torch.addmm(columns, fake_set.quick[part], real_set.quick.T, alpha=-2)
        beyond_real[part] = sums.amin(1)
        beyond_fake = torch.minimum(beyond_fake, sums.add_(own[part, None]).amin(0))
    beyond_real += _squares(fake_set)
    beyond_fake += real_radius.to(beyond_fake.dtype)
    in_real = _inside(beyond_real, fake_set, real_set, real_radius, rows)
    in_fake = _inside(beyond_fake, real_set, fake_set, fake_radius, rows)
    return PrecisionRecall(in_real.double().mean().item(), in_fake.double().mean().item())


def density_coverage(
    real: Tensor, fake: Tensor, *, k: int = 5, rows: int = 1024
) -> DensityCoverage:
    """Density and coverage of features (N, D), (M, D) (Naeem et al., arXiv 2002.09797)."""
    real_set, fake_set = _sets(real, fake, k=k)
    radius = _radii(real_set, k, rows)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for lo, near in _blocks(fake_set, real_set, rows):
        hits = _hits(near, radius, fake_set, real_set, slice(lo, lo + rows))
        inside += int(hits.sum())
        covered |= hits.any(0)
    return DensityCoverage(inside / (k * len(fake)), covered.double().mean().item())


class _Set(NamedTuple):
    """Features in float64 and as they are multiplied, and their lengths (N,)."""

    exact: Tensor
    quick: Tensor
    norm: Tensor


class _Near(NamedTuple):
    """Squared distances of a block; `bound` (M,) by how much they may be off, None in float64."""

    squared: Tensor
    bound: Tensor | None


def _sets(real: Tensor, fake: Tensor, *, k: int) -> tuple[_Set, _Set]:
    """Both about the real mean: |a|^2 + |b|^2 - 2 a.b then loses the fewest digits."""
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
    # A product in float32 is one in float32 only where nothing lower was allowed in its place.
    single = real.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    found = []
    for x in (real.double() - mean, fake.double() - mean):
        norm = torch.linalg.vector_norm(x, dim=1)
        low = single and 1e-15 < norm.max() < 1e15  # squares within the range of float32
        found.append(_Set(x, x.float() if low else x, norm))
    if found[0].quick.dtype != found[1].quick.dtype:
        found = [one._replace(quick=one.exact) for one in found]
    return found[0], found[1]


def _blocks(x: _Set, y: _Set, rows: int) -> Iterator[tuple[int, _Near]]:
    """(first row, distances of `rows` rows of x to all of y), block by block."""
    squares = _squares(y)
    for lo in range(0, len(x.quick), rows):
        yield lo, _near(x, y, slice(lo, lo + rows), slice(0, None), squares)


def _near(x: _Set, y: _Set, rows: slice, columns: slice, squares: Tensor) -> _Near:
    """Distances of some rows of x to some of y, whose squared lengths are known."""
    near = torch.addmm(squares[columns], x.quick[rows], y.quick[columns].T, alpha=-2)
    near.add_(_squares(x)[rows, None]).clamp_(min=0)
    if near.dtype == torch.float64:
        return _Near(near, None)
    return _Near(near, _rounding(x.norm[rows].max(), y.norm[columns], x.quick))


def _squares(x: _Set) -> Tensor:
    """Squared lengths, as they are added to products."""
    return x.norm.square().to(x.quick.dtype)


def _rounding(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """By how much a squared distance between features of lengths a and b may be off.

    Sums of D products round as random signs add up, by sqrt(D) eps; 8 times that is never met.
    """
    off = 8 * like.shape[1] ** 0.5 * torch.finfo(like.dtype).eps
    return (off * (a + b).square()).to(like.dtype)


def _hits(near: _Near, radius: Tensor, x: _Set, y: _Set, rows: slice) -> Tensor:
    """Where those rows of x lie within squared `radius` (M,) of y."""
    if near.bound is None:
        return _within(near.squared, radius, x.norm[rows], y)
    low = radius.float()
    hits = near.squared + near.bound <= low
    unsure = (hits != (near.squared - near.bound <= low)).any(1)
    if unsure.any():
        part = unsure.nonzero()[:, 0] + rows.start
        hits[unsure] = _within(_squared(x, part, y), radius, x.norm[part], y)
    return hits


def _inside(beyond: Tensor, x: _Set, y: _Set, radius: Tensor, rows: int) -> Tensor:
    """Which of x (N,) lie in a ball of y, by how far they are beyond the nearest one's edge; where
    that is less than rounding, by all distances in float64."""
    inside = beyond <= 0
    unsure = beyond.abs() <= _rounding(x.norm, y.norm.max(), x.quick)
    for part in unsure.nonzero()[:, 0].split(rows):
        inside[part] = _within(_squared(x, part, y), radius, x.norm[part], y).any(1)
    return inside


def _within(squared: Tensor, radius: Tensor, norm: Tensor, y: _Set) -> Tensor:
    """The comparison in float64; a point on the edge, to rounding, is inside."""
    return squared <= radius + _rounding(norm[:, None], y.norm, y.exact)


def _radii(x: _Set, k: int, rows: int, spare: int = 2) -> Tensor:
    """Squared distance (N,), float64, from each feature to its k-th nearest other one.

    Each block of distances serves its rows and, mirrored, its columns. The nearest k + `spare` by
    quick distances are measured exactly; where they may not hold the k nearest, all are.
    """
    count = len(x.exact)
    kept = min(k + spare, count - 1)
    best = torch.full((count, kept), torch.inf, dtype=x.quick.dtype, device=x.quick.device)
    index = torch.zeros((count, kept), dtype=torch.int64, device=x.quick.device)
    squares = _squares(x)

    def take(which: slice, squared: Tensor, first: int) -> None:
        """The nearest of what is known and of `squared`, whose columns begin with `first`."""
        found = squared.topk(min(kept, squared.shape[1]), dim=1, largest=False)
        both = torch.cat([best[which], found.values], 1).topk(kept, dim=1, largest=False)
        at = torch.cat([index[which], found.indices + first], 1)
        best[which], index[which] = both.values, at.gather(1, both.indices)

    for lo in range(0, count, rows):
        own, rest = slice(lo, lo + rows), slice(lo + rows, None)
        near = _near(x, x, own, slice(lo, None), squares)
        near.squared.fill_diagonal_(torch.inf)  # a feature is not its own neighbour
        take(own, near.squared, lo)
        if lo + rows < count:
            take(rest, near.squared[:, rows:].T.contiguous(), lo)
    if best.dtype == torch.float64:
        return best[:, k - 1]
    radii = torch.cat([_measured(x, part) for part in _parts(index, rows)])
    radii = radii.sort(1).values[:, k - 1]
    off = _rounding(x.norm.max(), x.norm, x.quick)
    # All others are at least as far as the last one kept, to rounding.
    unsure = radii > best[:, -1] - 2 * off if kept < count - 1 else radii < 0
    for part in unsure.nonzero()[:, 0].split(rows):
        squared = _squared(x, part, x)
        squared[torch.arange(len(part)), part] = torch.inf
        radii[part] = squared.topk(k, dim=1, largest=False).values[:, -1]
    return radii


def _parts(index: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of some rows at a time, few enough for their features to be gathered."""
    size = max(1, rows // 8)
    return ((lo, index[lo : lo + size]) for lo in range(0, len(index), size))


def _measured(x: _Set, part: tuple[int, Tensor]) -> Tensor:
    """Squared distances (rows, c), in float64, of features to those that `part` numbers."""
    lo, index = part
    own = slice(lo, lo + len(index))
    products = torch.bmm(x.exact[index], x.exact[own, :, None])[:, :, 0]
    squares = x.norm.square()
    return (squares[index] + squares[own, None] - 2 * products).clamp_(min=0)


def _squared(x: _Set, rows: Tensor, y: _Set) -> Tensor:
    """Squared distances (n, M), in float64, of some rows of x to y."""
    products = torch.addmm(y.norm.square(), x.exact[rows], y.exact.T, alpha=-2)
    return products.add_(x.norm[rows, None].square()).clamp_(min=0)
