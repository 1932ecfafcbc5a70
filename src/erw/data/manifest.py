"""What a cache says about itself: its spec (each setting that decides its bytes) and its files.

cache/
  prepare.json                     the spec, written first
  shards/00000.safetensors         labels and latents of shard 0
  shards/00000.images.safetensors  its cropped images, if they are stored
  shards/00000.1.safetensors       its features of encoder 1
  shards/00000.json                its record
  manifest.json                    written last: a cache without it is unfinished
  rejected.jsonl                   images left out, with path and reason

Each group of columns is a file of its own, so that a run opens (or downloads) only what it uses.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from erw.config import differences, flat, from_dict
from erw.errors import CacheError, raised_as
from erw.io import write_text

VERSION = 2
MANIFEST, SETTINGS, REJECTED = "manifest.json", "prepare.json", "rejected.jsonl"

SINGLE = ("label", "item", "image")  # columns that a row has once, the others also mirrored
Column = tuple[str, tuple[int, ...]]
"""Name of a column's torch dtype, and the shape of one row."""


@dataclass(frozen=True)
class SourceSpec:
    """Which images: name, a hash of the list of files and labels, and how many."""

    name: str
    fingerprint: str
    count: int


@dataclass(frozen=True)
class VaeSpec:
    """The VAE. `scale` and `shift`: one number, one per channel, or None where the cache measures
    them. `flops`: of encoding one image, multiply-add = 2."""

    name: str
    weight_hash: str
    factor: int
    scale: float | tuple[float, ...] | None
    shift: float | tuple[float, ...] | None
    flops: int
    revision: str | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """Features of one encoder. `grid`: rows and columns of tokens; `flops`: of one image;
    `class_dim`: width of the stored class token, 0 without one."""

    name: str
    weight_hash: str
    dim: int
    grid: tuple[int, int]
    flops: int
    format: str
    class_dim: int = 0
    revision: str | None = None


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

    def spans(self) -> list[range]:
        """The images of the source that go into each shard."""
        images, size = range(self.source.count), self.rows_per_shard
        return [images[first : first + size] for first in images[::size]]

    def columns(self) -> dict[str, dict[str, Column]]:
        """The columns of a shard, by the part of its file's name (see `shard_file`)."""
        variants = (2,) if self.flip else ()
        channels, *sides = self.latent_shape
        moments = ("float16", (*variants, 2 * channels, *sides))
        parts: dict[str, dict[str, Column]] = {
            "": {"label": ("int32", ()), "item": ("int64", ()), "moments": moments}
        }
        if self.images:
            parts["images"] = {"image": ("uint8", (3, self.image_size, self.image_size))}
        for number, encoder in enumerate(self.encoders):
            name, tokens = encoder.name, (*variants, math.prod(encoder.grid))
            columns = parts[str(number)] = {}
            columns[f"features.{name}"] = (encoder.format, (*tokens, encoder.dim))
            if encoder.format == "int8":
                columns[f"scale.{name}"] = ("float32", tokens)
            if encoder.class_dim:
                columns[f"class.{name}"] = ("float16", (*variants, encoder.class_dim))
        return parts

    def row_bytes(self) -> dict[str, int]:
        """Bytes of an image in every column."""
        columns = [column for part in self.columns().values() for column in part.items()]
        return {k: math.prod(shape) * getattr(torch, kind).itemsize for k, (kind, shape) in columns}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CacheSpec":
        """From JSON values, as `asdict` gives them. Raises CacheError for features of a kind that
        is gone, and what Python raises for damage."""
        for encoder in values["encoders"]:
            if "pca" in encoder or encoder["format"] == "float8":
                old = f"features of {encoder['name']} are principal components or float8"
                anew = "erw prepare IMAGES --features int8"
                raise CacheError(f"{old}, which this erw does not read: make them anew with {anew}")
        spec = from_dict(cls, values, strict=False)
        columns = [column for part in spec.columns().values() for column in part.values()]
        sides = [side for _, shape in columns for side in shape]
        sizes = (*sides, *spec.row_bytes().values(), spec.image_size, spec.vae.factor)
        if min(*sizes, spec.source.count, spec.rows_per_shard) < 1:
            raise ValueError("a size below 1")
        if spec.vae.scale is not None:
            _check_scaling(spec, spec.vae.shift, spec.vae.scale)
        return spec

    def differences(self, new: "CacheSpec") -> list[str]:
        """Settings in which two caches differ, as "crop (adm, now resize)".

        FLOPs and revisions do not count, nor the VAE's name: its weights' hash does.
        """

        def compared(spec: CacheSpec) -> dict[str, Any]:
            encoders = {encoder.name: asdict(encoder) for encoder in spec.encoders}
            values = flat(asdict(spec) | {"encoders": encoders}).items()
            return {k: v for k, v in values if not k.endswith((".flops", ".revision", "vae.name"))}

        return differences(compared(self), compared(new))


class File(NamedTuple):
    """What a manifest records of a file."""

    file: str
    bytes: int
    blake3: str


@dataclass(frozen=True)
class Shard:
    """Images `spec.spans()[index]` of the source, less those rejected, in `files`."""

    index: int
    rows: int
    files: tuple[File, ...]


@dataclass(frozen=True)
class Record:
    """All that the manifest needs to know about one shard."""

    shard: Shard
    rejected: list[tuple[int, str, str]]  # number, path, reason
    latent_sums: list[list[float]]  # see `erw.data.writer`

    @staticmethod
    def read(folder: Path, index: int) -> "Record | None":
        """A shard's record with those of its files that are there in full size, or None without
        the latents'."""
        sizes = {path.name: path.stat().st_size for path in folder.glob(f"{index:05d}.*")}
        try:
            values = json.loads((folder / f"{index:05d}.json").read_text())
            record = from_dict(Record, values, strict=False)
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return None
        shard = record.shard
        files = tuple(file for file in shard.files if sizes.get(file.file) == file.bytes)
        if shard.rows and shard_file(index) not in (file.file for file in files):
            return None
        return replace(record, shard=replace(shard, files=files))


@dataclass(frozen=True)
class Manifest:
    """A finished cache. `latent_mean`, `latent_std`: raw, per channel, of posterior samples."""

    spec: CacheSpec
    rows: int
    rejected: int
    class_names: tuple[str, ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...] = ()  # rows of each class; empty: without any, or an older cache

    @property
    def files(self) -> tuple[File, ...]:
        """The files of all shards."""
        return tuple(file for shard in self.shards for file in shard.files)

    @property
    def scaling(self) -> dict[str, list[float]]:
        """{"shift", "scale"} per channel, measured where the VAE has none; else empty."""
        if self.spec.vae.scale is not None:
            return {}
        return {"shift": list(self.latent_mean), "scale": [1 / std for std in self.latent_std]}

    def write(self, out: Path) -> None:
        """Write `manifest.json` in canonical form: equal caches have equal bytes."""
        values = asdict(self) | {"version": VERSION}
        values["settings"] = values.pop("spec")
        if not self.class_counts:  # as caches without classes, and older ones, always were
            del values["class_counts"]
        values["check"] = _check(values)
        write_text(out / MANIFEST, json.dumps(values, sort_keys=True, indent=1) + "\n")

    @staticmethod
    def parse(text: bytes, *, address: str) -> "Manifest":
        """From JSON. Raises `CacheError` naming `address` if damaged or of another version."""
        problem = f"{address} cannot be read: remove it and run erw prepare again"
        with raised_as(CacheError, problem):
            values = json.loads(text)
            if values["version"] != VERSION:
                raise ValueError(f"its version is {values['version']}, this erw reads {VERSION}")
            if values.pop("check") != _check(values):
                raise ValueError("its content does not match its checksum")
            spec = CacheSpec.from_json(values["settings"])
            manifest = from_dict(Manifest, values | {"spec": spec}, strict=False)
            if len(set(manifest.class_names)) < len(manifest.class_names):
                raise ValueError("two classes of one name")
            if any("/" in file.file for file in manifest.files):
                raise ValueError("a path where the name of a file was expected")
            if manifest.scaling:
                _check_scaling(spec, **manifest.scaling)
            row, rows = sum(spec.row_bytes().values()), sum(s.rows for s in manifest.shards)
            size = sum(f.bytes for f in manifest.files)
            if manifest.rows != rows or rows * row > size:
                raise ValueError(f"{manifest.rows} rows, but {rows} in its shards of {size} bytes")
            if (counts := manifest.class_counts) and (
                (len(counts), sum(counts)) != (len(manifest.class_names), rows) or min(counts) < 0
            ):
                raise ValueError(f"classes of {counts} rows, but {rows} in its shards")
        return manifest


def _check_scaling(spec: CacheSpec, shift: Any, scale: Any) -> None:
    """Raise an error unless there is one number for all channels, or one for each."""
    channels = spec.latent_shape[:1]
    torch.tensor(shift).expand(channels)
    if not (scales := torch.tensor(scale).expand(channels)).min() > 0:
        raise ValueError(f"scales of {scales.tolist()}, expected positive ones")


def shard_file(index: int, part: str = "") -> str:
    """The name of one of a shard's files: latents (""), "images", or an encoder's number."""
    return f"{index:05d}{part and f'.{part}'}.safetensors"


def readable(size: float) -> str:
    """Bytes in megabytes, or gigabytes from 10 GB on."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"


def _check(values: dict[str, Any]) -> str:
    return blake3(json.dumps(values, sort_keys=True).encode()).hexdigest()
