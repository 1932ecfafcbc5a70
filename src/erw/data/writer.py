"""Images to the shards of a cache: cropped by threads ahead of encoding, one shard at a time."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erw.data.cache import Cache
from erw.data.images import Unreadable, crop
from erw.data.loader import prefetch
from erw.data.manifest import Record
from erw.data.networks import Networks, one_thread_each
from erw.data.quantize import fidelity, pack
from erw.data.shards import Shard, ShardReader, shard_file, write_columns
from erw.data.sources import Source
from erw.data.spec import CacheSpec
from erw.errors import CacheError, DataError
from erw.io import remove_partial
from erw.log import Progress
from erw.rng import seeded


class Item(NamedTuple):
    """One image of the source, cropped, or the reason why not."""

    number: int
    pixels: np.ndarray | None  # uint8 (size, size, 3)
    label: int
    reason: str = ""


class StoredImages(Source):
    """The images in the rows of a cache, as a source: numbered as in the one it was made of."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.name, self.class_names = cache, cache.path.name, cache.class_names
        items = cache.items(range(len(cache)))
        self._rows = {int(item): row for row, item in enumerate(items)}

    def __len__(self) -> int:
        return self.cache.spec.source.count

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        if number not in self._rows:
            raise Unreadable("rejected when the cache was made")
        row = [self._rows[number]]
        image = self.cache.images(row)[0].permute(1, 2, 0).contiguous()
        return image.numpy(), int(self.cache.read(row).labels)

    def fingerprint(self) -> str:
        return self.cache.identity


class Writer:
    """Makes the missing files of shards.

    Args:
        out: the cache's folder.
        batch_size: images encoded at once.
        workers: threads that decode and crop; by default one per core, at most 8.
        strict: stop at the first bad image instead of rejecting it.
    """

    def __init__(
        self,
        out: Path,
        spec: CacheSpec,
        source: Source,
        networks: Networks,
        *,
        batch_size: int,
        workers: int | None = None,
        strict: bool = False,
    ) -> None:
        self.out, self.spec, self.source, self.networks = out, spec, source, networks
        self.folder = out / "shards"
        self.batch_size, self.strict = batch_size, strict
        self.workers = workers or min(8, os.cpu_count() or 1)

    def missing(self, index: int) -> list[str]:
        """Parts of a shard that are to be made; without the latents' file, all of them."""
        parts = list(self.spec.columns())
        if (record := Record.read(self.folder, index)) is None:
            return parts
        names = {file.file for file in record.shard.files}
        missing = [part for part in parts if shard_file(index, part) not in names]
        return [] if not record.shard.rows else parts if "" in missing else missing

    def write(self, indices: Sequence[int], progress: Progress) -> None:
        """Make what is missing of these shards. The result depends on neither threads nor ranks."""
        todo = {index: parts for index in indices if (parts := self.missing(index))}
        for index, parts in todo.items():
            if "" in parts and self.networks.vae is None:
                raise CacheError(
                    f"{self.out}: shard {index} is damaged: make it again with the erw prepare "
                    "that made the cache"
                )
            remove_partial(self.folder, [shard_file(index, part) for part in parts])
        numbers = list(chain.from_iterable(self.spec.span(index) for index in todo))
        if numbers:
            self._load(numbers[0])  # sources build tables on first use, which one thread must do
        items = prefetch(self._load, numbers, depth=64 * self.workers, threads=self.workers)
        with one_thread_each() as self._pool:
            for index, parts in todo.items():
                span = islice(items, len(self.spec.span(index)))
                try:
                    self._write_shard(index, parts, span, progress)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise CacheError(
                        f"could not write shard {index} of {self.out}: the disk is full; free some "
                        "room and run the same command again"
                    ) from error

    def _load(self, number: int) -> Item:
        # Stored images are cropped already: "adm" leaves those of the right size as they are.
        kind = "adm" if isinstance(self.source, StoredImages) else self.spec.crop
        try:
            image, label = self.source[number]
            seed = seeded(self.spec.seed, number)
            return Item(number, crop(image, self.spec.image_size, kind=kind, seed=seed), label)
        except Unreadable as error:
            return Item(number, None, 0, str(error))

    def _write_shard(
        self, index: int, parts: Sequence[str], items: Iterable[Item], progress: Progress
    ) -> None:
        """Make some of a shard's files, then its record."""
        before = None if "" in parts else Record.read(self.folder, index)
        known = self._stored_labels(before.shard) if before else None
        rejected: list[tuple[int, str, str]] = []
        batches: list[dict[str, Tensor]] = []
        batch: list[Item] = []
        for item in items:
            progress.update()
            if self._usable(item, known, rejected):
                batch.append(item)
            if len(batch) == self.batch_size:
                batches.append(self._encode(batch, parts))
                batch = []
        if batch:  # batches never cross shards, so that no other shard changes these bytes
            batches.append(self._encode(batch, parts))
        columns = {name: torch.cat([b[name] for b in batches]) for name in (batches or [{}])[0]}
        files, fidelities = {}, {}
        for part, names in self.spec.columns().items():
            if part in parts and batches:
                file = shard_file(index, part)
                chosen = {name: columns[name] for name in names}
                files[file] = write_columns(self.folder / file, chosen)
        for encoder in self.spec.encoders:
            if (cosine := columns.get(f"cosine.{encoder.name}")) is not None:
                least = float(cosine.min())
                fidelities[encoder.name] = float(cosine.sum()), cosine.numel(), least
        if before is None:
            span, counts = (
                self.spec.span(index),
                Counter(columns["label"].tolist() if batches else ()),
            )
            before = Record(
                Shard(index, span.start, len(span), counts.total(), ()),
                rejected,
                {str(label): count for label, count in sorted(counts.items())},
                _latent_sums(columns["moments"]) if batches else [],
                {},
            )
        files |= {file.file: file for file in before.shard.files}
        order = (shard_file(index, part) for part in self.spec.columns())
        shard = replace(before.shard, files=tuple(files[name] for name in order if name in files))
        replace(before, shard=shard, fidelity=before.fidelity | fidelities).write(self.folder)

    def _stored_labels(self, shard: Shard) -> dict[int, int]:
        """Label by the image's number, of the rows of a shard."""
        reader = ShardReader(shard, self.spec.columns(), lambda file: self.folder / file.file)
        return dict(zip(reader["item"].tolist(), reader["label"].tolist(), strict=True))

    def _usable(
        self, item: Item, known: dict[int, int] | None, rejected: list[tuple[int, str, str]]
    ) -> bool:
        """Whether an image has a row; notes those that cannot be read in `rejected`."""
        path = self.source.location(item.number)
        if known is not None:
            if item.number not in known:  # rejected when the row was to be stored
                return False
            if item.pixels is None or item.label != known[item.number]:
                reason = item.reason or f"label {item.label}, stored with {known[item.number]}"
                raise CacheError(f"{path} has changed since its row was stored: {reason}")
        elif item.pixels is None:
            if self.strict:
                raise DataError(f"{path}: {item.reason} (stopped because of --strict)")
            rejected.append((item.number, path, item.reason))
            return False
        elif not 0 <= item.label < max(1, classes := len(self.source.class_names)):
            raise DataError(f"{path} has label {item.label}, but there are {classes} classes")
        return True

    def _encode(self, batch: Sequence[Item], parts: Sequence[str]) -> dict[str, Tensor]:
        """The columns of some rows, on the CPU, and the cosines of stored features."""
        pixels = np.stack([item.pixels for item in batch if item.pixels is not None])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        variants = [images, images.flip(-1)] if self.spec.flip else [images]

        def run(network: Any) -> list[Tensor]:
            outputs = [self.networks.run(network, variant, self._pool) for variant in variants]
            both = zip(*outputs, strict=True)
            return [torch.stack(x, 1) if self.spec.flip else x[0] for x in both]

        columns = {}
        if "" in parts:
            columns["label"] = torch.tensor([item.label for item in batch], dtype=torch.int32)
            columns["item"] = torch.tensor([item.number for item in batch], dtype=torch.int64)
            (moments,) = run(self.networks.vae.encode)
            columns["moments"] = pack(moments, "float16", name="moments of latents").values
        if "images" in parts:
            columns["image"] = images
        for number, spec in enumerate(self.spec.encoders):
            if str(number) not in parts:
                continue
            encoder, name = self.networks.encoder(spec.name), spec.name
            tokens, *token = run(encoder.both if spec.class_dim else encoder)
            packed = pack(tokens, spec.format, name=f"features of {name}")
            columns[f"features.{name}"] = packed.values
            if packed.scale is not None:
                columns[f"scale.{name}"] = packed.scale
            if token:
                whole = pack(token[0], "float16", name=f"class tokens of {name}")
                columns[f"class.{name}"] = whole.values
            columns[f"cosine.{name}"] = fidelity(tokens, packed)
        return {name: column.cpu() for name, column in columns.items()}


def _latent_sums(moments: Tensor) -> list[list[float]]:
    """Per channel of moments (N, ..., 2C, h, w): sum of mean, of mean^2 + std^2; and the count."""
    mean, std = moments.double().flatten(0, -4).chunk(2, 1)
    sums = mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))
    return [*(part.tolist() for part in sums), [float(mean[:, 0].numel())]]
