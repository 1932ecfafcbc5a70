"""A prepared cache: latents' moments, teacher features and labels, read row by row."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw.data.batch import Batch as Batch
from erw.data.batch import FeatureSpec as FeatureSpec
from erw.data.batch import Stored as Stored
from erw.data.codec import Packed
from erw.data.columns import Columns
from erw.data.gather import Located, gather
from erw.data.limits import lift_file_limit
from erw.data.manifest import Manifest, Which, by_file, shard_file
from erw.data.shards import ShardReader, Written, hash_file
from erw.errors import CacheError

_MOST_MAPPED = 4 << 30  # bytes of shards
_AROUND = 1 << 16  # bytes that a system maps around a row


class Cache:
    """Random access to a prepared cache; make one with `prepare`, open it with `Cache.open`."""

    threads = 2
    """That may read at a time. One does not use all that memory gives, and more add nothing."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.where = str(path)  # as people call it
        settings = manifest.settings
        self.class_names = manifest.class_names
        self.class_counts = manifest.class_counts
        self.num_classes = len(manifest.class_names)
        self.latent_shape = manifest.latent_shape
        self.image_size: int = settings["image_size"]
        self.variants = 2 if settings["flip"] else 1
        self.vae: dict[str, Any] = settings["vae"] | manifest.scaling
        self.scaling = manifest.scaling or None  # what was measured, if the VAE asks for it
        self.features = {told["name"]: FeatureSpec.of(told) for told in settings["encoders"]}
        self._columns = Columns(self.features, self.latent_shape, self.image_size)
        self._shards = tuple(shard for shard in manifest.shards if shard.rows)
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._files = {file.file: file for shard in self._shards for file in shard.files}
        # Thousands of shards must not exhaust the file handles, nor those of several caches.
        limit = lift_file_limit(4 * len(self._files))
        self._shard = lru_cache(maxsize=max(32, limit // 4))(self._open)
        self._large = sum(file.bytes for file in manifest.files) > _MOST_MAPPED
        self._touched = 0  # bytes of the shards that are open, at most

    @classmethod
    def open(cls, path: str | Path) -> "Cache":
        """Open a finished cache, one at a URL (`Remote`) or an `Online`.

        Raises `CacheError` if it is missing, unfinished or cut short.
        """
        if "://" in str(path):
            from erw.data.remote import Remote

            return Remote.open(path)
        path = Path(path).expanduser()
        if (path / "online.json").is_file():
            from erw.data.online import Online

            return Online.open(path)
        manifest = Manifest.read(path)
        for file in manifest.files:
            _check_size(path / "shards" / file.file, file.bytes)
        if not manifest.rows:
            raise CacheError(f"cache {path} has no rows: prepare it again")
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def encoded(self) -> int:
        """Images that the teacher ever encodes for training: each row once."""
        return len(self)

    def __repr__(self) -> str:
        encoders = ", ".join(self.features) or "no features"
        return f"Cache({self.where!r}: {len(self)} rows, {self.vae['name']}, {encoders})"

    def read(
        self,
        indices: Sequence[int] | np.ndarray,
        *,
        features: Sequence[str] = (),
        token: str = "",
        flipped: np.ndarray | None = None,
    ) -> Batch:
        """Rows by number, in the order given, with the features of the encoders named.

        `token` names the encoder whose class token is wanted. `flipped` (bool, one a row) takes the
        mirrored variant where the cache holds one.
        """
        found = self.read_stored(indices, features=features, token=token, flipped=flipped)
        return found.to("cpu")

    def read_stored(
        self,
        indices: Sequence[int] | np.ndarray,
        *,
        features: Sequence[str] = (),
        token: str = "",
        flipped: np.ndarray | None = None,
    ) -> Stored:
        """As `read`, but nothing is scaled or unpacked until the rows are on their device."""
        names = self.columns(features=features, token=token)
        columns = self._gather(names, self._locate(indices, flipped))
        labels = columns["label"].long()
        if len(labels) and int(labels.max()) >= max(1, self.num_classes):
            raise CacheError(
                f"cache {self.where} has label {int(labels.max())} but {self.num_classes} classes"
            )
        return Stored(
            columns["moments"],
            _per_channel(self.vae["scale"]),
            _per_channel(self.vae["shift"]),
            labels,
            tuple(
                Packed(columns[f"features.{name}"], columns.get(f"scale.{name}"))
                for name in features
            ),
            columns.get(f"class.{token}"),
        )

    def columns(self, *, features: Sequence[str] = (), token: str = "") -> list[str]:
        """What is read of the shards for rows with these features and this class token."""
        self.require(encoders=features, token=token)
        return self._columns.names(features, token)

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The cropped images, uint8 (B, 3, H, W), of a cache made with `images=True`."""
        if not self.manifest.settings["images"]:
            raise CacheError(f"cache {self.where} holds no images: prepare it with --images")
        return self._gather(["image"], self._locate(indices, None))["image"]

    def items(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Numbers of these rows' images in the source, int64: rejected images leave gaps."""
        return self._gather(["item"], self._locate(indices, None))["item"].numpy()

    def verify(self) -> list[str]:
        """Rehash every shard; the names of files that are damaged, cut short or missing."""
        files = self.manifest.files
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            whole = pool.map(self._whole, files)
            return [file.file for file, good in zip(files, whole, strict=True) if not good]

    def _whole(self, file: Written) -> bool:
        try:
            return hash_file(self.file(file)) == file.blake3
        except OSError:
            return False

    def require(
        self,
        *,
        vae: Any = None,
        encoders: Sequence[Any] = (),
        token: str = "",
        tokens: int | None = None,
        image_size: int | None = None,
        flip: bool = False,
    ) -> None:
        """Raise `CacheError` unless this cache was made as told.

        `vae` and `encoders` are names, or objects with `name` and `weight_hash`; `tokens` is
        the number that every encoder asked for must give; `token` names an encoder whose class
        token must be there.
        """
        if vae is not None:
            name, held = _name(vae), self.vae["name"]
            told = getattr(vae, "weight_hash", None)  # if known it decides, wherever the VAE lies
            if (name != held) if told is None else (told != self.vae["weight_hash"]):
                other = "other weights of it" if name == held else name
                self._wrong(f"latents of VAE {held}, not of {other}", f"--vae {name}")
        for encoder in encoders:
            name = _name(encoder)
            if name not in self.features:
                held = ", ".join(self.features) or "no encoder"
                self._wrong(f"features of {held}, not of {name}", f"--encoders {name}")
            spec = self.features[name]
            if getattr(encoder, "weight_hash", None) not in (None, spec.weight_hash):
                self._wrong(f"features of other weights of {name}", f"--encoders {name}")
            if tokens is not None and spec.tokens != tokens:
                grid = f"{spec.grid[0]} x {spec.grid[1]}"
                raise CacheError(
                    f"cache {self.where}: {name} gives {grid} = {spec.tokens} tokens an image, the "
                    f"model has {tokens}: change the patch size, or the encoder's input (NAME@SIDE)"
                )
        if token and not (token in self.features and self.features[token].class_dim):
            self._wrong(f"no class token of {token}", f"--encoders {token} --class-token")
        if image_size is not None and image_size != self.image_size:
            self._wrong(f"images of side {self.image_size}", f"--image-size {image_size}")
        if flip and self.variants == 1:
            self._wrong("no flipped variant", "--flip")

    @cached_property
    def shard_rows(self) -> np.ndarray:
        """Rows of each shard, in the order of the rows, int64; empty where nothing is stored."""
        return np.diff(self._ends, prepend=0)

    def admit(self, window: int, columns: Sequence[str]) -> None:
        """Raise `CacheError` unless rows of so many shards (0: of all) can be read at random."""
        if window and not len(self._shards):
            raise CacheError(f"{self.where} stores no shards: leave out data.window")

    def expect(self, shards: Callable[[], np.ndarray], columns: Sequence[str]) -> None:
        """Hear which shards' columns are read next. Those on a local disk need no preparation."""

    @cached_property
    def identity(self) -> str:
        """A hash of everything that the cache holds."""
        return hash_file(self.path / "manifest.json")[:32]

    def file(self, file: Written) -> Path:
        """One of its files on this machine."""
        return self.path / "shards" / file.file

    def _wrong(self, what: str, option: str) -> None:
        raise CacheError(
            f"cache {self.where} holds {what}: make one with "
            f"erw prepare IMAGES --out OTHER_DIR {option}"
        )

    def _locate(self, indices: Sequence[int] | np.ndarray, flipped: np.ndarray | None) -> Located:
        index = np.asarray(indices, dtype=np.int64)
        if index.ndim != 1 or (len(index) and not 0 <= index.min() <= index.max() < len(self)):
            raise IndexError(f"rows {index} of a cache of {len(self)}")
        if flipped is not None and flipped.any():
            self.require(flip=True)
        variant = np.zeros_like(index) if flipped is None else flipped.astype(np.int64)
        place = np.argsort(index, kind="stable")  # visit each shard once
        shard = np.searchsorted(self._ends, index[place], side="right")
        row = index[place] - np.concatenate([[0], self._ends])[shard]
        return Located(shard, row, variant[place], place)

    def _gather(self, names: Sequence[str], rows: Located) -> dict[str, Tensor]:
        """Columns of the located rows, in batch order, as they are stored."""
        found: dict[str, Tensor] = {}
        for which, some in by_file(names, tuple(self.features)).items():
            found |= zip(some, self._gather_from(which, some, rows), strict=True)
        self._touched += sum(column.nbytes + len(column) * _AROUND for column in found.values())
        if self._large and self._touched > _MOST_MAPPED:
            # Pages that were touched count as this process's, and so do the tables that map them.
            self._shard.cache_clear()
            self._touched = 0
        return found

    def _gather_from(self, which: Which, names: Sequence[str], rows: Located) -> list[Tensor]:
        """Columns that lie in the same one of a shard's files."""
        kinds = {name: self._columns.kind(name) for name in names}

        def shard(number: int) -> ShardReader:
            return self._shard(number, which)

        return gather(kinds, rows, variants=self.variants, shard=shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.where,)  # of a process that is begun anew

    def _written(self, number: int, which: Which) -> Written:
        name = shard_file(self._shards[number].index, which)
        try:
            return self._files[name]
        except KeyError:
            raise CacheError(f"cache {self.where} has no file {name}: prepare it again") from None

    def _open(self, number: int, which: Which) -> ShardReader:
        path = self.file(self._written(number, which))
        return ShardReader(path, rows=self._shards[number].rows, variants=self.variants)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise CacheError(f"shard {path} is missing: run the same erw prepare again") from None
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise CacheError(
            f"shard {path} is {what} ({size} of {expected} bytes): erw prepare --repair"
        )


def _per_channel(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)


def _name(part: Any) -> str:
    return part if isinstance(part, str) else part.name
