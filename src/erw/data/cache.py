"""A prepared cache: latents' moments, teacher features and labels, read row by row.

It lies in a folder or at a URL (anything that fsspec opens). Files at a URL are downloaded whole,
once per machine, and named by their blake3, so that they serve every cache, address and process,
and what has a name is whole. (fsspec's own file cache neither checks contents nor renames.)
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from torch.utils._pytree import tree_map_only

from erw.data.manifest import MANIFEST, SINGLE, Column, File, Manifest, shard_file
from erw.data.quantize import Packed, unpack
from erw.data.statistics import Statistics, statistics
from erw.errors import CacheError, raised_as
from erw.io import cache_home, hash_file, load_tensors, lock

AGAIN = "run the same erw prepare again"
UNREACHABLE = (
    "{} cannot be read: check address, network, credentials and disk; s3:// and https:// need pip "
    "install 'erw[remote]', gs:// gcsfs"
)
Rows = Sequence[int] | np.ndarray  # by number
MEASURED = 4096  # images whose features are measured
DOWNLOADS = 8  # at a time: object stores give their bandwidth to many connections


class Batch(NamedTuple):
    """Rows of a cache. mean, std: float32 (B, C, h, w), shifted and scaled; labels: int64 (B,).

    features: one float32 (B, T, D) per requested encoder, tokens row by row; `Packed` as stored
    until `to(device)`. token: the class token (B, D) of the requested encoder, float32. A latent is
    `mean + std * noise`.
    """

    mean: Tensor
    std: Tensor
    labels: Tensor
    features: tuple[Any, ...] = ()
    token: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same rows on a device, which unpacks their features."""
        moved = self._each(lambda x: x.to(device, non_blocking=True))
        features = (unpack(f) if isinstance(f, Packed) else f for f in moved.features)
        return moved._replace(features=tuple(features))

    def pinned(self) -> "Batch":
        """The same rows in memory that a GPU reads while the host goes on."""
        return self._each(Tensor.pin_memory)

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that a stream needs the memory, too, when the batch is let go."""
        self._each(lambda x: x.record_stream(stream) or x)  # type: ignore[func-returns-value]

    def rows(self, index: slice) -> "Batch":
        """Some of the rows."""
        return self._each(lambda x: x[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return tree_map_only(Tensor, change, self)


class Part(NamedTuple):
    """One prepared folder or URL. `local` gives the path of one of its files on this machine."""

    address: str
    manifest: Manifest
    identity: str
    local: Callable[[File], Path]


def open_part(path: str | Path) -> Part:
    """A finished cache in a folder or at a URL, its files unchecked.

    fsspec's file system finds credentials and addresses. Raises `CacheError` where it cannot be
    read, or is damaged.
    """
    local: Callable[[File], Path]
    if "://" in str(path):
        address = str(path).rstrip("/")
        with raised_as(CacheError, UNREACHABLE.format(f"{address}/{MANIFEST}")):
            from fsspec.core import url_to_fs

            files, root = url_to_fs(address)
            text = files.cat_file(f"{root}/{MANIFEST}")
        local = partial(_download, files, f"{root}/shards", f"{address}/shards")
    else:
        folder = Path(path).expanduser()
        if (folder / "online.json").is_file():
            raise CacheError(f"{folder} encodes while training (--online): give it alone")
        if not (folder / MANIFEST).is_file():
            again = f"run erw prepare IMAGES --out {folder}"
            raise CacheError(f"no cache at {folder}, or an unfinished one: {again}")
        address, text = str(folder), (folder / MANIFEST).read_bytes()
        local = lambda file: folder / "shards" / file.file  # noqa: E731
    manifest = Manifest.parse(text, address=f"{address}/{MANIFEST}")
    return Part(address, manifest, blake3(text).hexdigest()[:32], local)


def map_columns(path: Path, columns: Mapping[str, Column], *, rows: int) -> dict[str, Tensor]:
    """The mapped columns of a shard's file. Raises `CacheError` unless it holds these."""
    with raised_as(CacheError, f"shard {path} is damaged: {AGAIN}"):
        mapped, _ = load_tensors(path)
    for name, (dtype, shape) in columns.items():
        column = mapped.get(name, torch.empty(0))
        kind, expected = str(column.dtype).removeprefix("torch."), (rows, *shape)
        if kind != dtype or column.shape != expected:
            stored = f"{kind} {tuple(column.shape)} as {name}"
            raise CacheError(f"shard {path} has {stored}, not {dtype} {expected}: {AGAIN}")
    return mapped


def _download(files: Any, root: str, url: str, file: File) -> Path:
    """The path of a file on this machine. Raises `CacheError` if it cannot be had undamaged."""
    folder = Path(os.environ.get("ERW_SHARD_CACHE") or cache_home() / "shards").expanduser()
    path, tmp = folder / f"{file.blake3}.safetensors", folder / f".{file.blake3}.part"
    if path.is_file():
        return path
    failed = raised_as(CacheError, UNREACHABLE.format(f"{url}/{file.file}"))
    with lock(folder / f".{file.blake3}.lock", wait=True), failed:
        if path.is_file():  # another process has downloaded it meanwhile
            return path
        try:
            files.get_file(f"{root}/{file.file}", str(tmp))
            if hash_file(tmp) == file.blake3:
                return tmp.rename(path)
        finally:
            tmp.unlink(missing_ok=True)
    again = "try again, or upload a copy that erw prepare --verify finds whole"
    raise CacheError(f"shard {file.file} arrived damaged from {url}: {again}")


class Cache:
    """Random access to the rows of one or more prepared caches; open it with `Cache.open`.

    Several caches read as one: rows one cache after the other, classes matched by name, latents
    scaled as the first cache's, the features that all of them have.
    """

    notes = ()  # see `Source`
    threads = 2  # that read: they saturate memory bandwidth

    def __init__(self, parts: Sequence[Part]) -> None:
        manifest = parts[0].manifest
        self.parts, self.manifest, self.spec = tuple(parts), manifest, manifest.spec
        self.address = self.name = " ".join(part.address for part in parts)  # for messages
        self.path = Path(parts[0].address)
        named = (name for part in parts for name in part.manifest.class_names)
        self.class_names = tuple(dict.fromkeys(named))
        self.num_classes = len(self.class_names)
        self.latent_shape, self.image_size = self.spec.latent_shape, self.spec.image_size
        self.scaling = manifest.scaling or None  # measured, where the VAE has none
        self.vae: dict[str, Any] = asdict(self.spec.vae) | manifest.scaling
        encoders = [{e.name: e for e in part.manifest.spec.encoders} for part in parts]
        common = set(encoders[0]).intersection(*encoders)
        self.features = {name: e for name, e in encoders[0].items() if name in common}
        names = (f"encoders.{name}." for name in common)
        same = ("flip", "image_size", "latent_shape", "vae.weight_hash", *names)
        for part in parts[1:]:
            changed = [x for x in self.spec.differences(part.manifest.spec) if x.startswith(same)]
            if bool(manifest.class_names) != bool(part.manifest.class_names):
                changed.append("only one of them has classes")
            if changed:
                both = f"{parts[0].address} and {part.address} cannot be read as one cache"
                raise CacheError(f"{both}: {', '.join(changed)}; prepare one of them again")
        self._columns = {k: v for group in self.spec.columns().values() for k, v in group.items()}
        self._columns["label"] = ("int64", ())  # numbers of the classes of all caches
        shards = [(part, shard) for part in parts for shard in part.manifest.shards if shard.rows]
        self._shards = [(part, shard, dict[str, Tensor]()) for part, shard in shards]
        self._ends = np.cumsum([shard.rows for _, shard in shards])
        self.encoded = len(self)  # images that the encoders ever see for training

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> "Cache":
        """Open a finished cache in a folder or at a URL, an online one, or several as one.

        Raises `CacheError` where one is unfinished or damaged, or they do not fit together.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if len(paths) == 1 and (Path(paths[0]).expanduser() / "online.json").is_file():
            from erw.data.on_the_fly import Online

            return Online(Path(paths[0]).expanduser())
        cache = Cache([open_part(one) for one in paths])
        for part in cache.parts:
            for file in part.manifest.files if "://" not in part.address else ():
                path = part.local(file)
                size = path.stat().st_size if path.is_file() else 0
                if size != file.bytes:
                    state = f"cut short or missing ({size} of {file.bytes} bytes)"
                    raise CacheError(f"shard {path} is {state}: {AGAIN}")
        return cache

    def __len__(self) -> int:
        return sum(part.manifest.rows for part in self.parts)

    @property
    def identity(self) -> str:
        """A hash of everything that the cache holds."""
        hashes = [part.identity for part in self.parts]
        return hashes[0] if len(hashes) == 1 else blake3("".join(hashes).encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        parts = f"{self.num_classes or 'no'} classes", self.vae["name"], *self.features
        return f"Cache({self.address!r}: {len(self)} rows, {', '.join(parts)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache.open, ([part.address for part in self.parts],)

    def read(
        self, indices: Rows, *, features: Sequence[str] = (), token: str = "",
        flipped: np.ndarray | None = None, packed: bool = False,
    ) -> Batch:  # fmt: skip
        """Rows by number, in the order given, with the features of these encoders, the class token
        of `token`, and the mirrored variant where `flipped` (bool, (B,)).

        `packed` leaves features as they are stored until `Batch.to`, and everything in pinned
        memory if there is a GPU.
        """
        self.require(encoders=features, token=token)
        if flipped is not None and flipped.any() and not self.spec.flip:
            self._lacks("no flipped variant", "--flip")
        names = ["label", "moments", *(f"features.{name}" for name in features)]
        names += [f"scale.{name}" for name in features if self.features[name].format == "int8"]
        names += [f"class.{token}"] if token else []
        columns = self.columns(names, indices, flipped)
        batch = Batch(
            *self.scaled(columns["moments"]),
            columns["label"],
            tuple(Packed(columns[f"features.{n}"], columns.get(f"scale.{n}")) for n in features),
            columns[f"class.{token}"].float() if token else None,
        )
        if not packed:
            return batch.to(batch.mean.device)
        pinned = torch.cuda.is_available() and batch.mean.is_cpu
        return batch._each(Tensor.pin_memory) if pinned else batch

    def scaled(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of latents, shifted and scaled, of raw moments (B, 2C, h, w)."""
        mean, std = moments.float().chunk(2, 1)
        values = (torch.tensor(self.vae[key], device=mean.device) for key in ("shift", "scale"))
        shift, scale = (value.reshape(-1, 1, 1) for value in values)
        return (mean - shift).mul_(scale), std * scale

    def images(self, indices: Rows) -> Tensor:
        """The cropped images, uint8 (B, 3, H, W), of a cache made with `images=True`."""
        if not all(part.manifest.spec.images for part in self.parts):
            self._lacks("no images", "--images")
        return self.columns(["image"], indices)["image"]

    def columns(
        self, names: Sequence[str], indices: Rows, flipped: np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Named columns of rows, in the order given, as they are stored; labels int64 (see `read`).
        `item` numbers the images in their source: rejected ones leave gaps."""
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1 or (len(index) and not 0 <= index.min() <= index.max() < len(self)):
            raise IndexError(f"rows {index} of a cache of {len(self)}")
        numbers = np.searchsorted(self._ends, index, side="right")
        rows = index - np.concatenate([[0], self._ends])[numbers]
        variants = np.zeros_like(index) if flipped is None else flipped.astype(np.int64)
        places = list(zip(numbers.tolist(), rows.tolist(), variants.tolist(), strict=True))
        if "://" in self.address:
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(pool.map(lambda n: [self._column(n, k) for k in names], set(numbers.tolist())))
        columns = {}
        for name in names:
            varied = self.spec.flip and name not in SINGLE
            dtype, shape = self._columns[name]
            column = torch.empty(len(index), *shape[varied:], dtype=getattr(torch, dtype))
            for place, (number, row, variant) in enumerate(places):
                stored = self._column(number, name)
                column[place] = stored[row, variant] if varied else stored[row]
            columns[name] = column
        return columns

    def class_counts(self) -> tuple[int, ...] | None:
        """Rows of each class. None where a cache of an older erw, which does not say, is remote."""
        counts, shards = Counter[str](), self._shards if self.class_names else []
        for known in (part.manifest for part in self.parts):
            counts.update(dict(zip(known.class_names, known.class_counts, strict=False)))
        older = [n for n, (part, *_) in enumerate(shards) if not part.manifest.class_counts]
        if older and "://" in self.address:
            return None
        for number in older:
            counts.update(self.class_names[i] for i in self._column(number, "label").tolist())
        return tuple(counts[name] for name in self.class_names)

    def statistics(self, encoder: str) -> Statistics:
        """Of an encoder's features, over `MEASURED` rows evenly spread, or all of fewer."""
        count = min(len(self), MEASURED)
        rows = np.arange(count) * len(self) // count
        parts = np.array_split(rows, -(-count // 64))
        return statistics(self.read(part, features=(encoder,)).features[0] for part in parts)

    def verify(self) -> list[str]:
        """Rehash every file; the names of those that are damaged, cut short or missing."""

        def damaged(place: tuple[Part, File]) -> bool:
            part, file = place
            with suppress(OSError, CacheError):
                return hash_file(part.local(file)) != file.blake3
            return True

        files = [(part, file) for part in self.parts for file in part.manifest.files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            flags = pool.map(damaged, files)
            return [file.file for (_, file), bad in zip(files, flags, strict=True) if bad]

    def require(
        self, *, encoders: Sequence[str] = (), tokens: int | None = None, token: str = ""
    ) -> None:
        """Raise `CacheError` unless it has features of `encoders`, of so many `tokens` each, and
        the class token of the encoder `token`."""
        for name in encoders:
            if name not in self.features:
                cached = ", ".join(self.features) or "no encoder"
                self._lacks(f"features of {cached}, not of {name}", f"--encoders {name}")
            rows, columns = self.features[name].grid
            if tokens not in (None, rows * columns):
                grid = f"{rows} x {columns} = {rows * columns} tokens an image"
                change = "change the patch size or the encoder's input (NAME@SIDE)"
                raise CacheError(f"{name} gives {grid}, the model has {tokens}: {change}")
        if token and not (token in self.features and self.features[token].class_dim):
            self._lacks(f"no class token of {token}", f"--encoders {token} --class-token")

    def _lacks(self, content: str, option: str) -> None:
        make = f"make one with erw prepare IMAGES --out OTHER_DIR {option}"
        raise CacheError(f"cache {self.address} holds {content}: {make}")

    def _column(self, number: int, name: str) -> Tensor:
        """A column of a shard, rows first, mapped; its pages are read when they are touched."""
        part, shard, mapped = self._shards[number]
        if name not in mapped:
            columns = part.manifest.spec.columns()
            kind = next(kind for kind, names in columns.items() if name in names)
            path = shard_file(shard.index, kind)
            file = next((f for f in shard.files if f.file == path), File(path, 0, ""))
            new = map_columns(part.local(file), columns[kind], rows=shard.rows)
            if kind == "":
                names, label = part.manifest.class_names, new["label"].long()
                numbers = {name: number for number, name in enumerate(self.class_names)}
                table = torch.tensor([numbers[name] for name in names] or [0])
                if len(bad := label[(label < 0) | (label >= len(table))]):
                    wrong = f"label {int(bad[0])} but {len(names)} classes"
                    raise CacheError(f"cache {part.address} has {wrong}: {AGAIN}")
                new["label"] = table[label]
            mapped |= new
        return mapped[name]
