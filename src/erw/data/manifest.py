"""What a cache says about itself: `manifest.json`, joined from one small record per shard.

cache/
  prepare.json                     its settings, written first
  shards/00000.safetensors         labels and latents of shard 0
  shards/00000.images.safetensors  its cropped images, if they are stored
  shards/00000.1.safetensors       its features of encoder 1
  shards/00000.json                its record
  manifest.json                    written last: a cache without it is unfinished
  rejected.jsonl                   images left out, with path and reason

Each group of columns is a file of its own, so that a run opens (or downloads) only what it uses.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from erw.data.shards import File, Shard
from erw.data.spec import CacheSpec
from erw.errors import CacheError
from erw.io import write_text

VERSION = 2
MANIFEST, SETTINGS, REJECTED = "manifest.json", "prepare.json", "rejected.jsonl"
CHECK = "check"  # of a manifest: the hash of the rest


@dataclass(frozen=True)
class Record:
    """All that the manifest needs to know about one shard."""

    shard: Shard
    rejected: list[tuple[int, str, str]]  # number, path, reason
    label_counts: dict[str, int]
    latent_sums: list[list[float]]  # per channel: sum of mean, sum of mean^2 + std^2; then [count]
    fidelity: dict[str, tuple[float, int, float]]  # encoder: sum, count and minimum of cosines

    def write(self, folder: Path) -> None:
        """Write `00000.json`."""
        write_text(_record_path(folder, self.shard.index), json.dumps(asdict(self), sort_keys=True))

    @staticmethod
    def read(folder: Path, index: int) -> "Record | None":
        """A shard's record with those of its files that are there in full size, or None."""
        try:
            values = json.loads(_record_path(folder, index).read_text())
            shard = _shard(**values["shard"])
            whole = tuple(file for file in shard.files if _size(folder / file.file) == file.bytes)
            values["shard"] = replace(shard, files=whole)
            return Record(**{name: values[name] for name in Record.__dataclass_fields__})
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class Manifest:
    """A finished cache."""

    spec: CacheSpec
    rows: int
    rejected: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    latent_mean: tuple[float, ...]  # raw, per channel, of posterior samples
    latent_std: tuple[float, ...]
    fidelity: dict[str, dict[str, float]]  # encoder: {"mean", "min"} cosine of stored features
    shards: tuple[Shard, ...]
    scaling: dict[str, list[float]] = field(default_factory=dict)
    """{"shift", "scale"} per channel, measured where the VAE has none."""

    @property
    def files(self) -> tuple[File, ...]:
        """The files of all shards."""
        return tuple(file for shard in self.shards for file in shard.files)

    def write(self, out: Path) -> None:
        """Write `manifest.json` in canonical form: equal caches have equal bytes."""
        values = asdict(self) | {"settings": self.spec.to_json(), "version": VERSION}
        del values["spec"]
        values["latent_shape"] = self.spec.latent_shape
        values = json.loads(json.dumps(values))
        values[CHECK] = _check(values)
        write_text(out / MANIFEST, json.dumps(values, sort_keys=True, indent=1) + "\n")

    @staticmethod
    def read(out: Path) -> "Manifest":
        """The manifest of the cache in a folder.

        Raises:
            CacheError: it is missing, damaged or of another version.
        """
        path = out / MANIFEST
        if not out.exists():
            raise CacheError(f"no cache at {out}: make one with: erw prepare IMAGES --out {out}")
        if not path.is_file():
            state = "an unfinished cache" if (out / SETTINGS).exists() else "no cache"
            raise CacheError(
                f"{out} is {state} ({MANIFEST} is missing): run erw prepare IMAGES --out {out}"
            )
        return Manifest.parse(path.read_bytes(), where=str(path))

    @staticmethod
    def parse(text: bytes, *, where: str) -> "Manifest":
        """A manifest from its text; `where` is named in errors, which are as for `read`."""
        try:
            values = json.loads(text)
            version = values["version"]
            if version == VERSION:
                if values.pop(CHECK) != _check(values):
                    raise ValueError("its content does not match its checksum")
                return _manifest(values)
        except CacheError as error:
            raise CacheError(f"{where}: {error}") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{where} is damaged ({error}): remove it and run erw prepare again"
            ) from error
        raise CacheError(
            f"{where} has version {version}, this erw reads {VERSION}: remove the cache and make "
            "it again with erw prepare"
        )


def _manifest(values: dict[str, Any]) -> Manifest:
    values = values | {
        "spec": CacheSpec.from_json(values["settings"]),
        "shards": tuple(_shard(**shard) for shard in values["shards"]),
    }
    for key in ("class_names", "class_counts", "latent_mean", "latent_std"):
        values[key] = tuple(values[key])
    known = (name for name in Manifest.__dataclass_fields__ if name in values)
    manifest = Manifest(**{name: values[name] for name in known})
    rows = sum(shard.rows for shard in manifest.shards)
    if not manifest.rows == rows == sum(manifest.class_counts):
        raise ValueError(f"{manifest.rows} rows, but {rows} in its shards")
    return manifest


def join(spec: CacheSpec, class_names: Sequence[str], records: Sequence[Record]) -> Manifest:
    """The manifest of the records of all shards, in order.

    Raises:
        CacheError: a channel without variance cannot be scaled.
    """
    counts = [0] * max(1, len(class_names))
    for record in records:
        for label, count in record.label_counts.items():
            counts[int(label)] += count
    mean, deviation = _moments(records)
    scaling = {}
    if spec.vae.scale is None:
        if min(deviation) < 1e-6:  # of a posterior at the lower bound of its log-variance
            raise CacheError(
                f"channel {deviation.index(min(deviation))} of the latents is the same everywhere: "
                f"VAE {spec.vae.name} cannot be scaled by their deviation"
            )
        scaling = {"shift": list(mean), "scale": [1 / value for value in deviation]}
    return Manifest(
        spec=spec,
        rows=sum(record.shard.rows for record in records),
        rejected=sum(len(record.rejected) for record in records),
        class_names=tuple(class_names),
        class_counts=tuple(counts),
        latent_mean=mean,
        latent_std=deviation,
        fidelity={encoder.name: _fidelity(records, encoder.name) for encoder in spec.encoders},
        shards=tuple(record.shard for record in records),
        scaling=scaling,
    )


def rejected_lines(records: Sequence[Record]) -> str:
    """The text of `rejected.jsonl`."""
    rows = sorted(tuple(row) for record in records for row in record.rejected)
    return "".join(
        json.dumps({"item": item, "path": path, "reason": reason}, ensure_ascii=False) + "\n"
        for item, path, reason in rows
    )


def _moments(records: Sequence[Record]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each raw channel, over samples of the posterior."""
    sums = [record.latent_sums for record in records if record.shard.rows]
    number = sum(s[2][0] for s in sums)
    first = [sum(column) / number for column in zip(*(s[0] for s in sums), strict=True)]
    second = [sum(column) / number for column in zip(*(s[1] for s in sums), strict=True)]
    spread = (max(0.0, b - a * a) ** 0.5 for a, b in zip(first, second, strict=True))
    return tuple(first), tuple(spread)


def _fidelity(records: Sequence[Record], encoder: str) -> dict[str, float]:
    parts = [record.fidelity[encoder] for record in records if record.shard.rows]
    mean = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    return {"mean": mean, "min": min(part[2] for part in parts)}


def _check(values: dict[str, Any]) -> str:
    """blake3 of a manifest's JSON values."""
    return blake3(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _shard(*, files: list[Any], **values: Any) -> Shard:
    if any("/" in str(text) for file in files for text in file):
        raise ValueError("a path where the name of a file was expected")
    return Shard(**values, files=tuple(File(*file) for file in files))


def _record_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.json"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
