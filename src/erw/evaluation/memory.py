"""Does a model repeat its training images? The nearest one of each sample, and what is usual.

A small distance alone says nothing: images that nobody trained on also have a nearest neighbour. So
held-out images are measured against the same training images, and a sample counts as suspicious if
it is nearer than all but one percent of those.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.errors import DataError
from erw.evaluation.features import PooledEncoder
from erw.evaluation.inputs import Images, image_set


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each sample.

    Attributes:
        index: number (N,) of the nearest training image, in their order.
        distance: (N,) 1 - cosine of both images' features: 0 is the same direction.
        usual: the same (M,) for images that were not trained on; None without any.
        suspicious: share of samples nearer than all but one percent of `usual`; None without it.
    """

    index: Tensor
    distance: Tensor
    usual: Tensor | None = None
    suspicious: float | None = None

    def to_dict(self, *, top: int = 16) -> dict[str, Any]:
        """Distribution and the `top` nearest pairs, as JSON values."""
        order = self.distance.argsort()[:top].tolist()
        pairs = [
            {"sample": i, "image": int(self.index[i]), "distance": float(self.distance[i])}
            for i in order
        ]
        return {
            "samples": _quantiles(self.distance),
            "held_out": None if self.usual is None else _quantiles(self.usual),
            "suspicious": self.suspicious,
            "nearest": pairs,
        }


def memorisation(
    samples: Images,
    *,
    training: Images,
    held_out: Images | None = None,
    encoder: PooledEncoder | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Nearest:
    """The nearest training image of every sample, and of every held-out image to compare with.

    Memory: the features of samples and held-out images; training images pass by in batches.

    Args:
        samples, training, held_out: what `erw.evaluate` takes.
        encoder: of pooled features; None: EfficientNet-Lite2.
        progress: is given the number of images of any of the three after each batch.

    Raises:
        DataError: fewer than 2 images in a set, or images of another type.
    """
    if encoder is None:
        from erw.encoders.registry import load_encoder

        encoder = load_encoder("efficientnet-lite2")
    asked = []
    for images, what in ((samples, "samples"), (held_out, "held-out images")):
        if images is not None:
            found = list(_features(images, encoder, batch_size, what, progress))
            asked.append(F.normalize(torch.cat(found), dim=1))
    queries = torch.cat(asked)
    best = torch.full((len(queries),), -torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    seen = 0
    for features in _features(training, encoder, batch_size, "training images", progress):
        value, where = (queries @ F.normalize(features, dim=1).T).max(1)
        nearer = value > best
        best, index = torch.where(nearer, value, best), torch.where(nearer, where + seen, index)
        seen += len(features)
    distance, n = (1 - best).clamp(min=0), len(asked[0])
    if held_out is None:
        return Nearest(index, distance)
    usual = distance[n:]
    share = (distance[:n] < usual.quantile(0.01)).double().mean().item()
    return Nearest(index[:n], distance[:n], usual, share)


def pairs_picture(samples: Images, training: Images, found: Nearest, *, columns: int = 8) -> Tensor:
    """uint8 (3, H, W): the nearest samples in a row, each over its training image.

    Raises DataError where the two sets are of different sizes.
    """
    above, below = nearest_pairs(samples, training, found, count=columns)
    return torch.cat([torch.cat(above, 2), torch.cat(below, 2)], 1)


def nearest_pairs(
    samples: Images, training: Images, found: Nearest, *, count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The `count` nearest samples, and the training image of each, uint8 (3, H, W).

    Raises DataError where the two sets are of different sizes.
    """
    order = found.distance.argsort()[:count].tolist()
    above = _pick(samples, order)
    below = _pick(training, [int(found.index[i]) for i in order])
    if above[0].shape != below[0].shape:
        raise DataError(
            f"samples are {tuple(above[0].shape[1:])}, training images "
            f"{tuple(below[0].shape[1:])}: a picture of both needs one size"
        )
    return above, below


def _pick(images: Images, wanted: Sequence[int]) -> list[Tensor]:
    found = image_set(images)
    return [next(found.batches(1, i, i + 1))[0].cpu() for i in wanted]


def _features(
    images: Images,
    encoder: PooledEncoder,
    batch_size: int,
    what: str,
    progress: Callable[[int], None] | None,
) -> Iterator[Tensor]:
    device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else "cpu"
    for batch in image_set(images, what=what).batches(batch_size):
        yield encoder.pooled(batch.to(device)).float().cpu()
        if progress:
            progress(len(batch))


def _quantiles(distance: Tensor) -> dict[str, float]:
    at = {"least": 0.0, "1%": 0.01, "10%": 0.1, "median": 0.5, "90%": 0.9, "most": 1.0}
    return {name: distance.double().quantile(q).item() for name, q in at.items()}
