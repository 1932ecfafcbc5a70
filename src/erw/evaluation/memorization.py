"""Does a model repeat its training images? The nearest one of each sample, and usual distances.

A small distance alone says nothing: an image that nobody trained on has a nearest neighbour too.
So held-out images are compared with the same training images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erw.encoders.registry import load_encoder
from erw.evaluation.features import PooledEncoder, Progress, pooled
from erw.evaluation.images import Images, image_set


class Nearest(NamedTuple):
    """The number (N,) of each sample's nearest training image, and its distance (N,), 1 - cosine of
    the features; `usual`: distances of images that were not trained on; `suspicious`: the share of
    samples nearer than all but one percent of these."""

    number: Tensor
    distance: Tensor
    usual: Tensor | None = None
    suspicious: float | None = None


def nearest_images(
    samples: Images, *, training: Images, held_out: Images | None = None,
    encoder: PooledEncoder | None = None, batch_size: int = 64, progress: Progress | None = None,
) -> Nearest:  # fmt: skip
    """The nearest training image of every sample, and of every held-out image for comparison.

    Images are as for `erw.evaluate`; the encoder is EfficientNet-Lite2 unless another is given.
    """
    encoder = encoder or load_encoder("efficientnet-lite2")

    def features(images: Images, what: str) -> Iterator[Tensor]:
        """Of length 1, (B, D)."""
        for batch in image_set(images, what=what).batches(batch_size):
            yield F.normalize(pooled(encoder, batch, what).float(), dim=1)
            if progress:
                progress(len(batch))

    queries = torch.cat([*features(samples, "samples")])
    count, first = len(queries), 0
    if held_out is not None:
        queries = torch.cat([queries, *features(held_out, "held-out images")])
    best = torch.full((len(queries),), -torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for part in features(training, "training images"):
        value, row = (queries @ part.T).max(1)
        nearer = value > best
        best, index = (torch.where(nearer, value, best), torch.where(nearer, row + first, index))
        first += len(part)
    distance, usual = (1 - best).clamp(min=0).tensor_split([count])
    if held_out is None:
        return Nearest(index, distance)
    share = (distance < usual.quantile(0.01)).double().mean().item()
    return Nearest(index[:count], distance, usual, share)
