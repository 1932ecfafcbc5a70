"""Images to the shards of a cache: cropped by threads ahead of encoding, one shard at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw.data.cache import map_columns
from erw.data.images import WHITE, Unreadable, crop
from erw.data.loader import prefetch
from erw.data.manifest import CacheSpec, File, Record, Shard, shard_file
from erw.data.networks import Networks
from erw.data.quantize import pack
from erw.data.sources import Source, overview
from erw.dist import World, one_thread_each
from erw.errors import CacheError, CheckpointError, ConfigError, DataError, one_line
from erw.io import hash_file, remove_partial, save_tensors, write_text
from erw.log import Progress


@dataclass
class Writer:
    """Makes the missing files of a cache's shards in the folder `out`; see `prepare`."""

    out: Path
    spec: CacheSpec
    source: Source
    networks: Networks
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: expected at least 1")
        self.folder, self.parts = self.out / "shards", self.spec.columns()

    def write(self, world: World, *, quiet: bool) -> None:
        """Make what is missing of this process's shards, to the same bytes for any number of
        threads and processes."""
        loaded = self.networks.encoders
        lacking = {str(n) for n, e in enumerate(self.spec.encoders) if e.name not in loaded}
        lacking |= {""} if self.networks.vae is None else set()
        todo = list[tuple[int, list[str], Record | None, list[int]]]()
        for index, span in list(enumerate(self.spec.spans()))[world.rank :: world.size]:
            record, images = Record.read(self.folder, index), list(span)
            names = {file.file for file in record.shard.files} if record else set()
            parts = [part for part in self.parts if shard_file(index, part) not in names]
            if not parts or (record and not record.shard.rows):
                continue
            if lacking.intersection(parts):
                problem = f"{self.out}: shard {index} is damaged or unfinished"
                again = "make it again with the erw prepare of all its encoders"
                raise CacheError(f"{problem}: {again}")
            remove_partial(self.folder, [shard_file(index, part) for part in parts])
            if record:  # the images that have a row already
                file, rows = self.folder / shard_file(index), record.shard.rows
                images = map_columns(file, self.parts[""], rows=rows)["item"].tolist()
            todo.append((index, parts, record, images))
        if numbers := [number for *_, images in todo for number in images]:
            self._load(numbers[0])  # sources build tables on first use, which one thread must do
        workers = min(16, os.cpu_count() or 1)
        items = prefetch(self._load, numbers, depth=64 * workers, threads=workers)
        progress = Progress(f"prepare {self.source.name}", len(numbers), unit="images", quiet=quiet)
        with progress as self._progress, one_thread_each() as self._pool:
            progress.say("\n".join(overview(self.source)))
            for index, parts, record, images in todo:
                shard = islice(items, len(images))
                try:
                    self._write_shard(index, parts, record, shard)
                except (OSError, CheckpointError) as error:
                    problem = f"could not make shard {index} of {self.out} ({one_line(error)})"
                    raise CacheError(f"{problem}: mend that, run the same command again") from error

    def _load(self, number: int) -> tuple[int, np.ndarray | None, Any]:
        """An image by its number: cropped, with its label; or None and the reason why not."""
        try:
            return number, *cropped(self.source, number, self.spec)
        except Unreadable as error:
            return number, None, str(error)

    def _write_shard(
        self, index: int, parts: Sequence[str], old: Record | None, images: Iterable[Any]
    ) -> None:
        """Make some of a shard's files, then its record."""
        rejected, batches = list[tuple[int, str, str]](), list[dict[str, Tensor]]()

        def usable() -> Iterator[tuple[int, np.ndarray, int]]:
            for number, pixels, label in images:
                self._progress.update()
                if pixels is not None:
                    yield number, pixels, label
                    continue
                path = self.source.location(number)
                if old:
                    raise CacheError(f"{path} has changed since its row was stored: {label}")
                rejected.append((number, path, label))

        rows = usable()
        while batch := list(islice(rows, self.batch_size)):
            batches.append(self._encode(batch, parts))
        columns = {name: torch.cat([b[name] for b in batches]) for name in (batches or [{}])[0]}
        files = {file.file: file for file in (old.shard.files if old else ())}
        for part in parts if batches else ():
            path = self.folder / shard_file(index, part)
            files[path.name] = write_columns(path, {k: columns[k] for k in self.parts[part]})
        names = [shard_file(index, part) for part in self.parts]
        count = old.shard.rows if old else len(columns.get("label", ()))
        shard = Shard(index, count, tuple(files[name] for name in names if name in files))
        sums = _latent_sums(columns["moments"]) if batches and not old else []
        record = replace(old, shard=shard) if old else Record(shard, rejected, sums)
        write_text(self.folder / f"{index:05d}.json", json.dumps(asdict(record), sort_keys=True))

    def _encode(
        self, rows: Sequence[tuple[int, np.ndarray, int]], parts: Sequence[str]
    ) -> dict[str, Tensor]:
        """The columns of some rows, on the CPU."""
        numbers, pixels, labels = zip(*rows, strict=True)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

        def run(network: Any) -> list[Tensor]:
            variants = [images, images.flip(-1)] if self.spec.flip else [images]
            outputs = [self.networks.run(network, x, classes, self._pool) for x in variants]
            both = zip(*outputs, strict=True)
            return [torch.stack(x, 1) if self.spec.flip else x[0] for x in both]

        columns, classes = {}, torch.tensor(labels)
        for part in parts:
            if part == "":
                columns["label"] = torch.tensor(labels, dtype=torch.int32)
                columns["item"] = torch.tensor(numbers, dtype=torch.int64)
                (moments,) = run(self.networks.vae.encode)
                columns["moments"] = pack(moments, "float16", name="moments of latents").values
            elif part == "images":
                columns["image"] = images
            else:
                spec = self.spec.encoders[int(part)]
                encoder = self.networks.encoders[spec.name]
                outputs = run(encoder.both if spec.class_dim else encoder)
                formats = {"features": spec.format, "class": "float16"}
                for (kind, form), output in zip(formats.items(), outputs, strict=False):
                    packed = pack(output, form, name=f"{kind} of {spec.name}")
                    columns[f"{kind}.{spec.name}"] = packed.values
                    if packed.scale is not None:
                        columns[f"scale.{spec.name}"] = packed.scale
        return {name: column.cpu() for name, column in columns.items()}


def cropped(source: Source, number: int, spec: CacheSpec) -> tuple[np.ndarray, int]:
    """An image as a cache has it, uint8 (size, size, 3), and its label. Raises `Unreadable`."""
    if (spec.crop, spec.background) != ("adm", WHITE):
        raise CacheError(f"crop {spec.crop} on {spec.background} is gone: prepare the images anew")
    (image, label), classes = source[number], len(source.class_names)
    if not 0 <= label < max(1, classes):
        path = source.location(number)
        raise DataError(f"{path} has label {label}, but there are {classes} classes")
    return crop(image, spec.image_size), label


def write_columns(path: Path, columns: Mapping[str, Tensor]) -> File:
    """Write columns (rows first), whole or not at all. Equal columns give equal bytes."""
    save_tensors(path, columns)
    return File(path.name, path.stat().st_size, hash_file(path))


def _latent_sums(moments: Tensor) -> list[list[float]]:
    """Per channel of moments (N, ..., 2C, h, w): sum of mean, of mean^2 + std^2; and the count."""
    mean, std = moments.double().flatten(0, -4).chunk(2, 1)
    sums = mean.sum((0, 2, 3)), (mean.square() + std.square()).sum((0, 2, 3))
    return [*(part.tolist() for part in sums), [float(mean[:, 0].numel())]]
