"""From images to statistics: pooled features of frozen encoders, several in one pass.

Statistics of references are stored as `CONTENT-COUNT-ENCODER-WEIGHTS-VERSION.safetensors`, in the
user's cache folder unless another is given. They may be deleted at any time.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erw.dist import World
from erw.errors import CheckpointError, NumericsError
from erw.evaluation.distances import Moments
from erw.evaluation.images import ImageSet
from erw.io import load_tensors, save_tensors

BLOCK = 256
"""Images whose features are folded into the moments at once: it takes as long for fewer."""
VERSION = "v2"
"""Of the files of statistics: raise it when their tensors or their numbers change."""
ALONE = World(0, 1, torch.device("cpu"))
Progress = Callable[[int], None]


class PooledEncoder(Protocol):
    """An encoder of whole images, such as an `erw.encoders.base.Encoder`."""

    name: str

    def pooled(self, images: Tensor) -> Tensor: ...


class Extractor(NamedTuple):
    """An encoder, the hash of its weights, and how many leading features of each image are kept:
    None keeps all, 0 none. The moments are of all features."""

    encoder: PooledEncoder
    weights: str = ""
    kept: int | None = 0


class Statistics(NamedTuple):
    """Moments of the features of a set of images, and the features that were kept, (N, kept)."""

    moments: Moments
    features: Tensor


def pooled(encoder: PooledEncoder, images: Tensor, name: str) -> Tensor:
    """Features (B, D) of uint8 images (B, 3, H, W) of a set, on the CPU; all finite."""
    device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else "cpu"
    features = encoder.pooled(images.to(device)).cpu()
    if not torch.isfinite(features).all():
        raise NumericsError(f"{name}: features of {encoder.name} are not finite")
    return features


def extract(
    images: ImageSet, extractors: Mapping[str, Extractor], *, batch_size: int = 64,
    world: World = ALONE, progress: Progress | None = None,
) -> dict[str, Statistics]:  # fmt: skip
    """Statistics of `images` under several encoders, by name. Raises NumericsError as `pooled`.

    Each rank takes a range of the images; all call this, all get the statistics of the whole.
    `progress` is given the number of images after each block of this rank.
    """
    moments: dict[str, Moments] = {}  # empty on a rank without images
    kept: dict[str, list[Tensor]] = {name: [] for name in extractors}
    first, stop = (images.count * rank // world.size for rank in (world.rank, world.rank + 1))
    batches = iter(images.batches(batch_size, first, stop))
    while some := list(islice(batches, max(1, BLOCK // batch_size))):
        for name, one in extractors.items():
            block = torch.cat([pooled(one.encoder, batch, images.name) for batch in some])
            new = Moments.of(block)
            moments[name] = moments[name] + new if name in moments else new
            kept[name].append(block[:, : one.kept].clone())
        if progress:
            progress(sum(map(len, some)))
    ranks = world.gather((moments, kept))
    return {
        name: Statistics(
            reduce(Moments.__add__, [moments[name] for moments, _ in ranks if moments]),
            torch.cat([block for _, kept in ranks for block in kept[name]]),
        )
        for name in extractors
    }


def extract_stored(
    images: ImageSet, extractors: Mapping[str, Extractor], folder: Path, *, world: World,
    **options: Any,
) -> dict[str, Statistics]:  # fmt: skip
    """Statistics of a reference by name, from `folder` where every rank has them, else made and
    stored by the first. `options` are those of `extract`."""
    statistics: dict[str, Statistics] = {}
    paths: dict[str, Path] = {}
    for name, one in extractors.items():
        encoder = one.encoder.name.replace("/", "_")
        stem = f"{images.content}-{images.count}-{encoder}-{one.weights}-{VERSION}"
        paths[name] = folder / f"{stem}.safetensors"
        with contextlib.suppress(CheckpointError):  # missing or damaged
            stored, _ = load_tensors(paths[name])
            if stored["features"].numel() or one.kept == 0:
                moments = Moments(int(stored["count"]), stored["mean"], stored["scatter"])
                statistics[name] = Statistics(moments, stored["features"])
    new = {k: one for k, one in extractors.items() if world.agree(k not in statistics)}
    statistics |= extract(images, new, world=world, **options) if new else {}
    for name in new if world.first else ():
        moments, features = statistics[name]
        tensors = {"mean": moments.mean, "scatter": moments.scatter, "features": features}
        save_tensors(paths[name], tensors | {"count": torch.tensor(moments.count)})
    return statistics
