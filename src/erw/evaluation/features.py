"""From images to statistics: pooled features of frozen encoders, several in one pass.

Statistics of references are cached in `CONTENT-COUNT-ENCODER-WEIGHTS.safetensors`, in the user's
cache folder unless another is given. They may be deleted at any time.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erw.dist import World
from erw.errors import CheckpointError, DataError, NumericsError
from erw.evaluation.distances import Moments
from erw.evaluation.images import ImageSet
from erw.io import load_tensors, save_tensors

BLOCK = 1024
"""Rows of features that are folded into the moments at once."""
ALONE = World(0, 1, torch.device("cpu"))
Progress = Callable[[int], None]


class PooledEncoder(Protocol):
    """An encoder of whole images; every `erw.encoders.base.Encoder` with `pooled` is one.

    With an attribute `kept`, only so many leading features of an image are kept where all images'
    are needed; moments are of all of them.
    """

    name: str

    def pooled(self, images: Tensor) -> Tensor: ...


class Extractor(NamedTuple):
    """An encoder, the hash and file of its weights, and whether all its features are kept."""

    encoder: PooledEncoder
    weights: str = ""
    file: str = ""
    keep: bool = False

    @property
    def described(self) -> dict[str, str]:
        """As a result records it."""
        return {"encoder": self.encoder.name, "weights": self.weights, "file": self.file}

    @property
    def columns(self) -> slice:
        """The features of an image that are kept."""
        return slice(getattr(self.encoder, "kept", None))


@dataclass(frozen=True)
class Statistics:
    """Features of a set of images: their moments, and all of them (N, D) where they were kept.

    `resolution` is (height, width) of the images, None where it is not known.
    """

    moments: Moments
    features: Tensor | None = None
    resolution: tuple[int, int] | None = None


def extract(
    images: ImageSet,
    extractors: Sequence[Extractor],
    *,
    batch_size: int = 64,
    world: World = ALONE,
    progress: Progress | None = None,
) -> list[Statistics]:
    """Statistics of `images` under several encoders.

    Args:
        world: the ranks that share the images, each a range of them; all call this, all get the
            statistics of the whole.
        progress: is given the number of images after each batch of this rank.

    Raises:
        NumericsError: features that are not finite.
    """
    first, stop = (images.count * rank // world.size for rank in (world.rank, world.rank + 1))
    totals = [_Total(extractor) for extractor in extractors]
    for batch in images.batches(batch_size, first, stop):
        for total in totals:
            total.add(batch, images.name)
        if progress:
            progress(len(batch))
    for total in totals:
        total.fold()
    return [_joined(world.gather((t.moments, t.kept)), images.resolution) for t in totals]


def _joined(
    ranks: Sequence[tuple[Moments | None, list[Tensor]]], resolution: tuple[int, int]
) -> Statistics:
    """The statistics of all ranks' images, in order; a rank without any has no moments."""
    moments = reduce(Moments.__add__, (moments for moments, _ in ranks if moments))
    blocks = [block for _, kept in ranks for block in kept]
    return Statistics(moments, torch.cat(blocks) if blocks else None, resolution)


class _Total:
    """Features of one encoder, added up."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.rows: list[Tensor] = []  # not yet in the moments
        self.kept: list[Tensor] = []
        self.moments: Moments | None = None

    def add(self, batch: Tensor, name: str) -> None:
        encoder = self.extractor.encoder
        device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else "cpu"
        features = encoder.pooled(batch.to(device)).cpu()
        if bad := int((~torch.isfinite(features)).any(1).sum()):
            raise NumericsError(
                f"{name}: {encoder.name} features of {bad} of {len(batch)} images are not finite"
            )
        self.rows.append(features)
        if sum(map(len, self.rows)) >= BLOCK:
            self.fold()

    def fold(self) -> None:
        """Take up the rows that are not yet in the moments."""
        if self.rows:
            block, self.rows = torch.cat(self.rows), []
            moments = Moments.of(block)
            self.moments = moments if self.moments is None else self.moments + moments
            if self.extractor.keep:
                self.kept.append(block[:, self.extractor.columns].clone())


def extract_cached(
    images: ImageSet,
    extractors: Mapping[str, Extractor],
    folder: Path,
    *,
    batch_size: int,
    world: World,
) -> dict[str, Statistics]:
    """Statistics of a reference by space, from `folder` where they are cached; on the first rank.

    Other ranks get those that are new.
    """
    statistics: dict[str, Statistics] = {}
    paths = {
        space: folder / f"{images.content}-{images.count}-"
        f"{one.encoder.name.replace('/', '_')}-{one.weights}.safetensors"
        for space, one in extractors.items()
    }

    def look() -> list[str]:
        """Load what is cached; the spaces that are missing."""
        for space, one in extractors.items():
            try:
                cached = load_statistics(paths[space])
            except (CheckpointError, DataError):
                continue  # missing, or damaged: made again
            if cached.features is not None or not one.keep:
                statistics[space] = cached
        return [space for space in extractors if space not in statistics]

    if missing := world.broadcast(look):
        new = extract(
            images, [extractors[space] for space in missing], batch_size=batch_size, world=world
        )
        statistics |= zip(missing, new, strict=True)
        for space in missing if world.first else ():
            # A full disk only costs time at the next evaluation.
            with contextlib.suppress(CheckpointError):
                save_statistics(paths[space], statistics[space])
    return statistics


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write statistics as safetensors, to be given as a reference later."""
    moments = statistics.moments
    tensors = {"count": torch.tensor(moments.count)}
    tensors |= {"mean": moments.mean, "scatter": moments.scatter}
    if statistics.features is not None:
        tensors["features"] = statistics.features
    if statistics.resolution is not None:
        tensors["resolution"] = torch.tensor(statistics.resolution)
    save_tensors(Path(path), tensors)


def load_statistics(path: str | Path) -> Statistics:
    """What `save_statistics` wrote. Raises CheckpointError or DataError for another file."""
    tensors, _ = load_tensors(Path(path))
    if missing := {"count", "mean", "scatter"} - tensors.keys():
        raise DataError(f"{path} holds no statistics (no {', '.join(missing)}): make it again")
    moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])
    resolution = tensors.get("resolution")
    size = None if resolution is None else (int(resolution[0]), int(resolution[1]))
    return Statistics(moments, tensors.get("features"), size)
