"""How sure a score is: bootstrap intervals, and the Fréchet distance for infinitely many images."""

from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import DataError
from erw.evaluation.distances import Moments, frechet_features


class Interval(NamedTuple):
    """A value and the bounds that hold it with the asked confidence."""

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

    Resampling repeats images, which raises the distance itself as fewer images would; the basic
    interval [2 v - q_high, 2 v - q_low] of the resampled quantiles q takes that bias out again. It
    speaks of the spread from the choice of images, not of seeds of training.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise DataError(
            f"resamples {resamples} (>= 2) or confidence {confidence} (0..1) is impossible"
        )
    value = frechet_features(reference, features)
    rng = torch.Generator().manual_seed(seed)
    values = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        rows = torch.randint(len(features), (len(features),), generator=rng)
        values[i] = frechet_features(reference, features[rows])
    tail = (1 - confidence) / 2
    return Interval(
        value,
        2 * value - values.quantile(1 - tail).item(),
        2 * value - values.quantile(tail).item(),
    )


def frechet_infinity(
    features: Tensor, reference: Moments, *, points: int = 15, least: float = 0.1, seed: int = 0
) -> float:
    """The Fréchet distance extrapolated to infinitely many generated images.

    The distance of N images is biased by a term that falls as 1 / N: a line is fitted over 1 / N
    for `points` random subsets of evenly spaced sizes from `least` N to N, and read off at 0.
    Source: Chong and Forsyth (arXiv 1911.07023). The reference's own bias stays.
    """
    total = len(features)
    smallest = max(2, int(least * total))
    if points < 2 or smallest >= total:
        raise DataError(f"{total} images and {points} points: too few to extrapolate from")
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(smallest, total, points).round().int().tolist()
    values = []
    for size in sizes:
        rows = torch.randperm(total, generator=rng)[:size]
        values.append(frechet_features(reference, features[rows]))
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    design = torch.stack([torch.ones_like(inverse), inverse], dim=1)
    line = torch.linalg.lstsq(design, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return line[0, 0].item()
