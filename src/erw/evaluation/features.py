"""From images to statistics: features of frozen encoders, all in one pass over the images.

The pass goes by chunks of images. Of one process each chunk is added up as it is done; of several
each process takes its chunks, and the first one adds all of them up in their order: so the sums are
the same whoever made the features. Chunks on disk are not made again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erw.dist import World
from erw.errors import DataError, NumericsError
from erw.evaluation.distances import Moments
from erw.evaluation.inputs import ImageSet
from erw.evaluation.stored import Chunk, Chunks
from erw.evaluation.stored import Statistics as Statistics
from erw.evaluation.stored import cache_folder as cache_folder
from erw.evaluation.stored import load_statistics as load_statistics
from erw.evaluation.stored import save_statistics as save_statistics

CHUNK = 1024
"""Images of a chunk: what is lost at most by a kill, in each process."""
Progress = Callable[[int], None]


class PooledEncoder(Protocol):
    """What is asked of an encoder; every `erw.encoders.base.Encoder` with `pooled` is one.

    An attribute `kept`, if there is one, says how many leading features of an image are kept where
    all are asked for; moments are of all of them.
    """

    name: str

    def pooled(self, images: Tensor) -> Tensor: ...


class Wanted(NamedTuple):
    """Features to make: by which encoder, whether to keep them all, and their name on disk."""

    encoder: PooledEncoder
    keep: bool = False
    key: str = ""


def statistics(
    images: ImageSet,
    encoder: PooledEncoder,
    *,
    keep: bool = False,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of `images` under `encoder.pooled`; `keep` holds on to all features (N, D).

    Raises NumericsError for features that are not finite.
    """
    found = extract(images, [Wanted(encoder, keep)], batch_size=batch_size, progress=progress)
    assert found is not None
    return found[0]


def extract(
    images: ImageSet,
    wanted: Sequence[Wanted],
    *,
    chunks: Chunks | None = None,
    chunk: int = CHUNK,
    batch_size: int = 64,
    world: World | None = None,
    progress: Progress | None = None,
) -> list[Statistics] | None:
    """Statistics of `images` under several encoders, in one pass; None but in the first process.

    Args:
        chunks: where features are kept, and looked for; needed by several processes.
        world: the processes that share the work; each of them must call this.
        progress: is given the number of images after each batch of this process.

    Raises:
        NumericsError: features that are not finite.
        DataError: images of several sizes, or several processes that share no `chunks`.
    """
    rank, size = (world.rank, world.size) if world else (0, 1)
    if size > 1 and (chunks is None or images.count is None):
        raise DataError(
            f"{images.name} cannot be split over {size} processes, since its content is not known: "
            "write the images to files first, or run one process"
        )
    totals = [_Total(one) for one in wanted]
    for number, batches in enumerate(_pieces(images, chunk, batch_size)):
        if number % size == rank:
            made = _chunk(images.name, batches, wanted, chunks, number, progress)
            for total, part in zip(totals, made if size == 1 else [], strict=False):
                total.add(images.name, part)
    if size > 1:
        assert world is not None and chunks is not None and images.count is not None
        world.barrier()
        if rank:
            return None
        for total in totals:
            for number in range(-(-images.count // chunk)):
                total.add(images.name, _of_others(chunks, total.wanted.key, number))
    return [total.statistics() for total in totals]


def _of_others(chunks: Chunks, key: str, number: int) -> Chunk:
    """A chunk that any of the processes made."""
    if (found := chunks.read(key, number)) is None:
        raise DataError(
            f"chunk {number} that another process made is not in {chunks.folder}: let "
            "$XDG_CACHE_HOME name a folder that all machines share"
        )
    return found


@dataclass
class _Total:
    """Chunks added up, in order."""

    wanted: Wanted
    moments: Moments | None = None
    kept: list[Tensor] = field(default_factory=list)
    resolution: tuple[int, int] | None = None

    def add(self, name: str, part: Chunk) -> None:
        if self.resolution is not None and self.resolution != part.resolution:
            a, b = (f"{w} x {h}" for h, w in (part.resolution, self.resolution))
            raise DataError(f"{name} holds {a} after {b} images: bring them to one size first")
        self.resolution = part.resolution
        moments = Moments.of(part.features)
        self.moments = moments if self.moments is None else self.moments + moments
        if self.wanted.keep:
            columns = getattr(self.wanted.encoder, "kept", None)
            self.kept.append(
                part.features if columns is None else part.features[:, :columns].clone()
            )

    def statistics(self) -> Statistics:
        if self.moments is None:
            raise DataError("no features: the set of images is empty")
        return Statistics(
            self.moments, torch.cat(self.kept) if self.wanted.keep else None, self.resolution
        )


def _pieces(
    images: ImageSet, chunk: int, batch_size: int
) -> Iterator[Callable[[], Iterator[Tensor]]]:
    """The batches of each chunk, to be read if they are needed."""
    if images.count is not None:
        for first in range(0, images.count, chunk):
            stop = min(first + chunk, images.count)
            yield lambda first=first, stop=stop: images.batches(batch_size, first, stop)  # type: ignore[misc]
        return
    stream = images.batches(batch_size)
    for head in stream:
        rest = list(islice(stream, max(1, chunk // batch_size) - 1))
        yield lambda head=head, rest=rest: iter([head, *rest])  # type: ignore[misc]


def _chunk(
    name: str,
    batches: Callable[[], Iterator[Tensor]],
    wanted: Sequence[Wanted],
    chunks: Chunks | None,
    number: int,
    progress: Progress | None,
) -> list[Chunk]:
    """One chunk under every encoder, from the disk or made, and then kept."""
    found = [chunks.read(one.key, number) if chunks else None for one in wanted]
    missing = {i: one for i, one in enumerate(wanted) if found[i] is None}
    rows: dict[int, list[Tensor]] = {i: [] for i in missing}
    resolution = (0, 0)
    for batch in batches() if missing else ():
        resolution = (batch.shape[2], batch.shape[3])
        for i, one in missing.items():
            rows[i].append(_features(one.encoder, batch, name))
        if progress:
            progress(len(batch))
    for i, one in missing.items():
        found[i] = made = Chunk(torch.cat(rows[i]), resolution)
        if chunks:
            chunks.write(one.key, number, made)
    done = [part for part in found if part is not None]
    if progress and not missing:
        progress(len(done[0].features))
    return done


def _features(encoder: PooledEncoder, batch: Tensor, name: str) -> Tensor:
    device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else "cpu"
    features = encoder.pooled(batch.to(device)).cpu()
    if not torch.isfinite(features).all():
        rows = (~torch.isfinite(features)).any(1)
        raise NumericsError(
            f"{name}: {encoder.name} features of {int(rows.sum())} of {len(rows)} images are not "
            "finite"
        )
    return features
