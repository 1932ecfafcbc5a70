"""Mean and deviation of features over images, and how near they are to that mean."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Statistics(NamedTuple):
    """Of tokens over images and places: mean and deviation (D,), and the mean cosine of a token
    with the mean. Where that is 1, a network that gives the mean alone is aligned."""

    mean: Tensor
    deviation: Tensor
    nearness: float

    def standardized(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D), each channel with mean 0 and deviation 1 over the images."""
        return (tokens - self.mean.to(tokens)) / (self.deviation.to(tokens) + 1e-6)


def statistics(batches: Iterable[Tensor]) -> Statistics:
    """Of tokens (B, T, D), batch by batch."""
    parts = (batch.flatten(0, 1).double() for batch in batches)
    sums = [torch.stack([z, z.square(), normalize(z, dim=1), z**0]).sum(1) for z in parts]
    *totals, count = torch.stack(sums).sum(0)
    mean, square, unit = (total / count for total in totals)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return Statistics(mean.float(), deviation.float(), float(unit @ normalize(mean, dim=0)))
