"""Images to rows of a cache: cropping in threads ahead of encoding, then columns of one shard."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from erw.data.codec import Packed, fidelity, pack, to_numpy
from erw.data.encoding import Networks
from erw.data.images import Unreadable, crop
from erw.data.manifest import IMAGES, Record, Shard, Which, by_file, shard_file
from erw.data.shards import Column, Written
from erw.data.sources import Source, where
from erw.errors import CacheError, DataError
from erw.rng import seeded


class Item(NamedTuple):
    """One image of the source, cropped, or the reason why not."""

    number: int
    pixels: np.ndarray | None  # uint8 (size, size, 3)
    label: int
    reason: str


class Span(NamedTuple):
    """What is made at a time: source items `first` to `stop`, into files of a shard.

    `source`: which of the cache's sources they are of. `added`: None for the files that a shard
    begins with, else the number of an encoder that was added later. `held`: where one was, item and
    label of each row that the shard has; `pixels`: what its images hashed to then.
    """

    shard: int
    first: int
    stop: int
    source: int = 0
    added: int | None = None
    held: tuple[tuple[int, int], ...] | None = None
    pixels: str = ""

    @property
    def items(self) -> Sequence[int]:
        """Numbers of the images to be read."""
        if self.held is None:
            return range(self.first, self.stop)
        return [item for item, _ in self.held]

    def encoders(self, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Number and settings of the encoders whose features are made."""
        told = dict(enumerate(settings["encoders"]))
        if self.added is not None:
            return {self.added: told[self.added]}
        return {i: one for i, one in told.items() if self.source >= one.get("beside", 0)}

    def files(self, settings: dict[str, Any]) -> list[str]:
        """Names of the files that it is made into: none are, where every image is rejected."""
        which: list[Which] = [None] if self.added is None else []
        which += [IMAGES] if self.added is None and settings["images"] else []
        which += self.encoders(settings)
        return [shard_file(self.shard, one) for one in which]


def cropped(
    source: Source, spans: Iterable[Span], *, size: int, kind: str, seed: int, workers: int
) -> Iterator[tuple[Span, Iterator[Item]]]:
    """For each span its items in order, decoded and cropped by `workers` threads ahead of use.

    Spans are asked for as threads become free, so also while the one before is being encoded.
    """

    def load(number: int) -> Item:
        try:
            image, label = source[number]
            square = crop(image, size, kind=kind, seed=seeded(seed, number))
            return Item(number, square, label, "")
        except Unreadable as error:
            return Item(number, None, 0, str(error))

    todo = ((span, number) for span in spans for number in span.items)
    pending: deque[tuple[Span, Future[Item]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="crop") as pool:

        def top_up() -> None:
            while len(pending) < 64 * workers and (task := next(todo, None)) is not None:
                pending.append((task[0], pool.submit(load, task[1])))

        def items(span: Span) -> Iterator[Item]:
            while pending and pending[0][0] == span:
                future = pending.popleft()[1]
                top_up()
                yield future.result()

        try:
            if (task := next(todo, None)) is not None:
                pending.append((task[0], pool.submit(load, task[1])))
                pending[0][1].result()  # sources build tables on first use: let one thread do it
            top_up()
            while pending:
                span = pending[0][0]
                yield span, items(span)
        finally:
            for _, future in pending:
                future.cancel()


@dataclass
class Filling:
    """Rows of one shard while it grows."""

    span: Span
    parts: dict[str, list[tuple[str, np.ndarray]]] = field(default_factory=dict)
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    sums: list[list[float]] = field(default_factory=list)
    cosines: dict[str, tuple[float, int, float]] = field(default_factory=dict)
    pixels: Any = field(default_factory=blake3)

    def add(self, name: str, values: Tensor) -> None:
        """Append rows to a column."""
        kind = str(values.dtype).removeprefix("torch.")
        self.parts.setdefault(name, []).append((kind, to_numpy(values)))

    def files(self, encoders: Sequence[str]) -> dict[str, dict[str, Column]]:
        """Everything that was added, joined: columns by the name of their file."""
        return {
            shard_file(self.span.shard, which): {name: self._joined(name) for name in names}
            for which, names in by_file(self.parts, encoders).items()
        }

    def _joined(self, name: str) -> Column:
        parts = self.parts[name]
        return Column(parts[0][0], np.concatenate([values for _, values in parts]))

    def record(self, files: tuple[Written, ...]) -> Record:
        """What to note about the files."""
        span, rows = self.span, sum(self.labels.values())
        shard = Shard(span.shard, span.first, span.stop - span.first, rows, files)
        labels = {str(label): count for label, count in sorted(self.labels.items())}
        if span.added is not None:  # the shard's first record tells these
            labels = {}
        pixels = self.pixels.hexdigest()
        return Record(shard, self.rejected, labels, self.sums, self.cosines, pixels)


def fill(
    source: Source,
    span: Span,
    items: Iterable[Item],
    *,
    networks: Networks,
    batch_size: int,
    options: dict[str, Any],
    strict: bool,
    advance: Any,
) -> Filling:
    """Encode a span's items. Batches never cross shards, so no neighbour changes its bytes."""
    filling = Filling(span)
    batch: list[Item] = []
    held = dict(span.held or ())
    for item in items:
        if item.pixels is None or (held and held[item.number] != item.label):
            path = where(source, item.number)
            if span.held is not None:
                reason = item.reason or f"label {item.label}, stored with {held[item.number]}"
                raise CacheError(f"{path} has changed since its row was stored: {reason}")
            if strict:
                raise DataError(f"{path}: {item.reason} (stopped because of --strict)")
            filling.rejected.append((item.number, path, item.reason))
            advance(1)
            continue
        batch.append(item)
        if len(batch) == batch_size:
            _encode(filling, batch, networks, options)
            advance(len(batch))
            batch = []
    if batch:
        _encode(filling, batch, networks, options)
        advance(len(batch))
    if span.pixels not in ("", filling.pixels.hexdigest()):
        raise CacheError(
            f"images {span.first} to {span.stop - 1} of {source.name} have changed since their "
            "rows were stored: put them back as they were, or prepare another cache of them"
        )
    return filling


def stacked(batch: Sequence[Item]) -> Tensor:
    """Pixels of items as uint8 (B, 3, size, size)."""
    pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def _encode(
    filling: Filling, batch: list[Item], networks: Networks, options: dict[str, Any]
) -> None:
    """Add one batch of rows: label, item, moments and features, of both variants if flipped."""
    images = stacked(batch)
    filling.pixels.update(images.numpy())
    filling.labels.update(item.label for item in batch)
    pixels = images.to(networks.device)
    variants = [pixels, pixels.flip(-1)] if options["flip"] else [pixels]

    def encode(network: Any) -> list[Tensor]:
        """All that it gives, each (B, ...) or, with two variants, (B, 2, ...), float32."""
        given = [networks.run(network, variant) for variant in variants]
        outputs = zip(*(out if isinstance(out, tuple) else (out,) for out in given), strict=True)
        return [torch.stack(x, 1) if len(variants) == 2 else x[0] for x in outputs]

    if filling.span.added is None:
        filling.add("label", torch.tensor([item.label for item in batch], dtype=torch.int32))
        filling.add("item", torch.tensor([item.number for item in batch], dtype=torch.int64))
        if options["images"]:
            filling.add("image", images)
        _add_moments(filling, *encode(networks.vae.encode))
    for told in filling.span.encoders(options).values():
        name = told["name"]
        encoder = networks.encoder(name)
        tokens, *token = encode(encoder.both if told.get("class_dim") else encoder)
        for whole in token:
            packed = pack(whole, "float16", name=f"class tokens of {name}")
            filling.add(f"class.{name}", packed.values)
        if reduction := networks.pca.get(name):
            tokens = reduction.reduce(tokens)
        packed = pack(tokens, told["format"], name=f"features of {name}")
        filling.add(f"features.{name}", packed.values)
        if packed.scale is not None:
            filling.add(f"scale.{name}", packed.scale)
        _note_fidelity(filling, name, tokens, packed)


def _add_moments(filling: Filling, moments: Tensor) -> None:
    """Raw mean and std as float16, and per-channel sums for the latents' own statistics."""
    mean, std = moments.chunk(2, dim=-3)
    filling.add("moments", pack(moments, "float16", name="moments of latents").values)
    others = [axis for axis in range(mean.ndim) if axis != mean.ndim - 3]
    first = mean.double().sum(others).tolist()
    second = (mean.double().square() + std.double().square()).sum(others).tolist()
    number = [float(mean.numel() // mean.shape[-3])]
    new = [first, second, number]
    old = filling.sums or [[0.0] * len(part) for part in new]
    filling.sums = [
        [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(old, new, strict=True)
    ]


def _note_fidelity(filling: Filling, name: str, tokens: Tensor, packed: Packed) -> None:
    cosine = fidelity(tokens, packed)
    total, count, least = filling.cosines.get(name, (0.0, 0, 1.0))
    filling.cosines[name] = (
        total + float(cosine.sum()),
        count + cosine.numel(),
        min(least, float(cosine.min())),
    )
