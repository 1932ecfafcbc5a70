"""From images to statistics: pooled features of frozen encoders, several in one pass.

Statistics of references are stored as `CONTENT-COUNT-ENCODER-WEIGHTS.safetensors`, in the user's
cache folder unless another is given. They may be deleted at any time.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erw.dist import World
from erw.errors import CheckpointError, NumericsError
from erw.evaluation.distances import Moments
from erw.evaluation.images import ImageSet
from erw.io import load_tensors, save_tensors

BLOCK = 1024
"""Rows of features that are folded into the moments at once."""
ALONE = World(0, 1, torch.device("cpu"))
Progress = Callable[[int], None]


class PooledEncoder(Protocol):
    """An encoder of whole images, such as an `erw.encoders.base.Encoder`.

    With an attribute `kept`, only so many leading features of an image are kept where all images'
    are needed; moments are of all of them.
    """

    name: str

    def pooled(self, images: Tensor) -> Tensor: ...


class Extractor(NamedTuple):
    """An encoder, the hash of its weights, and whether all its features are kept."""

    encoder: PooledEncoder
    weights: str = ""
    keep: bool = False

    @property
    def columns(self) -> slice:
        """The features of an image that are kept."""
        return slice(getattr(self.encoder, "kept", None))


@dataclass(frozen=True)
class Statistics:
    """Moments of the features of a set of images, and all features (N, D), empty if not kept."""

    moments: Moments
    features: Tensor = field(default_factory=lambda: torch.empty(0))


def pooled(encoder: PooledEncoder, images: Tensor, name: str) -> Tensor:
    """Features (B, D) of uint8 images (B, 3, H, W) of a set, on the CPU; all finite."""
    device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else "cpu"
    features = encoder.pooled(images.to(device)).cpu()
    if not torch.isfinite(features).all():
        raise NumericsError(f"{name}: features of {encoder.name} are not finite")
    return features


def extract(
    images: ImageSet,
    extractors: Sequence[Extractor],
    *,
    batch_size: int = 64,
    world: World = ALONE,
    progress: Progress | None = None,
) -> list[Statistics]:
    """Statistics of `images` under several encoders. Raises NumericsError as `pooled`.

    Each rank of `world` takes a range of the images; all call this, all get the statistics of the
    whole. `progress` is given the number of images after each batch of this rank.
    """
    moments: list[Moments | None] = [None] * len(extractors)
    kept: list[list[Tensor]] = [[] for _ in extractors]
    rows: list[list[Tensor]] = []  # features of each encoder, not yet in the moments

    def fold() -> None:
        for i, parts in enumerate(zip(*rows, strict=True)):
            block, old = torch.cat(parts), moments[i]
            moments[i] = Moments.of(block) if old is None else old + Moments.of(block)
            if extractors[i].keep:
                kept[i].append(block[:, extractors[i].columns].clone())
        rows.clear()

    first, stop = (images.count * rank // world.size for rank in (world.rank, world.rank + 1))
    for batch in images.batches(batch_size, first, stop):
        rows.append([pooled(one.encoder, batch, images.name) for one in extractors])
        if sum(len(row[0]) for row in rows) >= BLOCK:
            fold()
        if progress:
            progress(len(batch))
    fold()
    statistics = []
    for mine in zip(moments, kept, strict=True):
        ranks = world.gather(mine)  # one without images has no moments
        total = reduce(Moments.__add__, (moments for moments, _ in ranks if moments))
        blocks = [block for _, kept in ranks for block in kept]
        statistics.append(Statistics(total, torch.cat(blocks) if blocks else torch.empty(0)))
    return statistics


def extract_stored(
    images: ImageSet,
    extractors: Mapping[str, Extractor],
    folder: Path,
    *,
    batch_size: int,
    world: World,
) -> dict[str, Statistics]:
    """Statistics of a reference by space, from `folder` where they are stored; on the first rank.

    Other ranks get those that are new.
    """
    statistics: dict[str, Statistics] = {}
    paths = {
        space: folder / f"{images.content}-{images.count}-"
        f"{one.encoder.name.replace('/', '_')}-{one.weights}.safetensors"
        for space, one in extractors.items()
    }

    def look() -> list[str]:
        """Load what is stored; the spaces that are missing, or damaged."""
        for space, one in extractors.items():
            with contextlib.suppress(CheckpointError, KeyError):  # damaged, or of another version
                stored, _ = load_tensors(paths[space])
                if len(stored["features"]) or not one.keep:
                    moments = Moments(int(stored["count"]), stored["mean"], stored["scatter"])
                    statistics[space] = Statistics(moments, stored["features"])
        return [space for space in extractors if space not in statistics]

    missing = world.broadcast(look)
    some = [extractors[space] for space in missing]
    new = extract(images, some, batch_size=batch_size, world=world) if missing else []
    for space, made in zip(missing, new, strict=True):
        statistics[space], moments = made, made.moments
        if world.first:
            tensors = {"mean": moments.mean, "scatter": moments.scatter, "features": made.features}
            save_tensors(paths[space], tensors | {"count": torch.tensor(moments.count)})
    return statistics
