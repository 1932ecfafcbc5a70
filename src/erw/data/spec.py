"""What a cache is made of: every setting that decides its bytes, as frozen records and JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch

from erw.data.sources import Source
from erw.errors import CacheError

T = TypeVar("T")

Column = tuple[str, tuple[int, ...]]
"""Name of a column's torch dtype, and the shape of one row."""

SINGLE = ("label", "item", "image")
"""Columns that a row has once, also where the others have a mirrored variant."""


@dataclass(frozen=True)
class SourceSpec:
    """Which images: name, a hash of the list of files and labels, and how many."""

    name: str
    fingerprint: str
    count: int

    @classmethod
    def of(cls, source: Source) -> "SourceSpec":
        return cls(source.name, source.fingerprint(), len(source))


@dataclass(frozen=True)
class VaeSpec:
    """The VAE. `scale` and `shift`: one number, one per channel, or None where the cache measures
    them. `flops`: of encoding one image, multiply-add = 2."""

    name: str
    weight_hash: str
    factor: int
    scale: float | Sequence[float] | None
    shift: float | Sequence[float] | None
    flops: int
    revision: str | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """Features of one encoder. `grid`: rows and columns of tokens; `flops`: of one image.

    `class_dim`: width of the stored class token, 0 without one.
    """

    name: str
    weight_hash: str
    dim: int
    grid: tuple[int, int]
    flops: int
    format: str
    class_dim: int = 0
    revision: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class CacheSpec:
    """A whole cache; see `erw.data.prepare.prepare` for the settings. `latent_shape`: (C, h, w)."""

    source: SourceSpec
    background: tuple[int, int, int]
    crop: str
    image_size: int
    rows_per_shard: int
    precision: str
    seed: int
    flip: bool
    images: bool
    latent_shape: tuple[int, int, int]
    vae: VaeSpec
    encoders: tuple[EncoderSpec, ...] = ()

    @property
    def shards(self) -> int:
        """How many shards the source fills."""
        return math.ceil(self.source.count / self.rows_per_shard)

    def span(self, index: int) -> range:
        """The images of the source that go into a shard."""
        first = index * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.source.count))

    def columns(self) -> dict[str, dict[str, Column]]:
        """The columns of a shard, by the part of its file's name (see `shard_file`)."""
        variants = (2,) if self.flip else ()
        channels, *sides = self.latent_shape
        parts: dict[str, dict[str, Column]] = {
            "": {
                "label": ("int32", ()),
                "item": ("int64", ()),
                "moments": ("float16", (*variants, 2 * channels, *sides)),
            }
        }
        if self.images:
            parts["images"] = {"image": ("uint8", (3, self.image_size, self.image_size))}
        for number, encoder in enumerate(self.encoders):
            name, tokens = encoder.name, (*variants, encoder.tokens)
            columns: dict[str, Column] = {
                f"features.{name}": (encoder.format, (*tokens, encoder.dim))
            }
            if encoder.format == "int8":
                columns[f"scale.{name}"] = ("float32", tokens)
            if encoder.class_dim:
                columns[f"class.{name}"] = ("float16", (*variants, encoder.class_dim))
            parts[str(number)] = columns
        return parts

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` is the inverse."""
        values = json.loads(json.dumps(asdict(self)))
        for part in (values["vae"], *values["encoders"]):
            for name in ("revision", "class_dim"):
                if not part.get(name, True):
                    del part[name]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CacheSpec":
        """From the settings of a cache of format 2.

        Raises:
            CacheError: its features are stored in a way that is gone.
            KeyError, TypeError: a value is missing.
        """
        for encoder in values["encoders"]:
            if "pca" in encoder or encoder["format"] == "float8":
                form = "principal components" if "pca" in encoder else "float8"
                raise CacheError(
                    f"features of {encoder['name']} are stored as {form}, which this erw does not "
                    "read: prepare another cache with erw prepare IMAGES --features int8"
                )
        parts = {
            "source": _record(SourceSpec, values["source"]),
            "vae": _record(VaeSpec, values["vae"]),
            "encoders": tuple(_record(EncoderSpec, encoder) for encoder in values["encoders"]),
        }
        return _record(cls, values | parts)

    def differences(self, new: "CacheSpec") -> list[str]:
        """Settings in which two caches differ, as "crop (adm, now resize)".

        FLOPs and revisions do not count, nor the VAE's name: its weights' hash does.
        """
        before, after = _flat(self.to_json()), _flat(new.to_json())
        return [
            f"{key} ({before.get(key, 'none')}, now {after.get(key, 'none')})"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
            and not key.endswith((".flops", ".revision"))
            and key != "vae.name"
        ]

    def with_encoders(self, new: Sequence[EncoderSpec], *, where: object) -> "CacheSpec":
        """With more encoders; those that it has already must agree with it.

        Raises:
            CacheError: an encoder is there in another form.
        """
        names = [encoder.name for encoder in self.encoders]
        again = {encoder.name: encoder for encoder in new if encoder.name in names}
        alike = tuple(again.get(encoder.name, encoder) for encoder in self.encoders)
        if changed := self.differences(replace(self, encoders=alike)):
            raise CacheError(f"{where} has other features already: {', '.join(changed)}")
        added = (encoder for encoder in new if encoder.name not in names)
        return replace(self, encoders=(*self.encoders, *added))


def size_table(spec: CacheSpec) -> str:
    """Bytes per image and in all of every column of a cache, one line each, and their sum."""
    count, total = spec.source.count, 0
    lines = [f"{'column':<34}{'shape':<24}{'bytes/image':>12}{'in all':>14}"]
    for columns in spec.columns().values():
        for name, column in columns.items():
            size, shape = column_bytes(column), "x".join(map(str, column[1]))
            total += size
            lines.append(
                f"{name:<34}{f'{shape} {column[0]}':<24}{size:>12,}{readable(size * count):>14}"
            )
    lines.append(f"{'all':<58}{total:>12,}{readable(total * count):>14}")
    return "\n".join(lines)


def column_bytes(column: Column) -> int:
    """Bytes of one row of a column."""
    return math.prod(column[1]) * getattr(torch, column[0]).itemsize


def readable(size: float) -> str:
    """Bytes in megabytes, or gigabytes from 10 GB on."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def _record(kind: type[T], values: dict[str, Any]) -> T:
    """A record from JSON values, lists as tuples; keys of other versions are left out."""
    known = {name: values[name] for name in kind.__dataclass_fields__ if name in values}  # type: ignore[attr-defined]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON values by dotted keys; list items that are records by their name."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        pairs = [(item["name"], item) for item in value]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in pairs:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
