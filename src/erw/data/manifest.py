"""What a cache says about itself: `manifest.json`, joined from one small record per shard.

cache/
  prepare.json            the settings it is being made with (from the first moment)
  shards/00000.safetensors, shards/00000.json      rows and record of shard 0
  manifest.json           written last: a cache without it is unfinished
  rejected.jsonl          images left out, with path and reason
  report.json             how long it took; not part of the cache's identity
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CacheError
from .shards import Written, write_text

VERSION = 1
MANIFEST, SETTINGS, REJECTED, REPORT = (
    "manifest.json",
    "prepare.json",
    "rejected.jsonl",
    "report.json",
)


@dataclass(frozen=True)
class Shard:
    """One shard: source items `first` to `first + items`, less those rejected.

    `files` are beside each other under `shards/`; their columns together make up its rows.
    """

    index: int
    first: int
    items: int
    rows: int
    files: tuple[Written, ...]


@dataclass(frozen=True)
class Record:
    """What is known once a shard is written; the manifest is made of these alone."""

    shard: Shard
    rejected: list[tuple[int, str, str]]  # item, path, reason
    label_counts: dict[str, int]
    latent_sums: list[list[float]]  # per channel: sum of mean, sum of mean^2 + std^2; then [count]
    fidelity: dict[str, tuple[float, int, float]]  # encoder: sum, count, least cosine

    def write(self, folder: Path) -> None:
        """Write to `folder`/NNNNN.json."""
        write_text(record_path(folder, self.shard.index), json.dumps(asdict(self), sort_keys=True))

    @staticmethod
    def read(folder: Path, index: int) -> "Record | None":
        """The record of a shard whose files are all there and whole in size, else None."""
        try:
            found = json.loads(record_path(folder, index).read_text())
            shard = _shard(found.pop("shard"))
            if any((folder / f.file).stat().st_size != f.bytes for f in shard.files):
                return None
            return Record(shard=shard, **found)
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class Manifest:
    """The whole cache. `settings` is what `prepare` was asked for (see `settings.describe`)."""

    version: int
    settings: dict[str, Any]
    rows: int
    rejected: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    latent_shape: tuple[int, int, int]
    latent_mean: tuple[float, ...]  # raw, per channel, of posterior samples
    latent_std: tuple[float, ...]
    fidelity: dict[str, dict[str, float]]  # encoder: {"mean", "min"} cosine of stored features
    shards: tuple[Shard, ...]

    def write(self, out: Path) -> None:
        """Write `manifest.json` in canonical form: equal caches have equal bytes."""
        write_text(out / MANIFEST, json.dumps(asdict(self), sort_keys=True, indent=1) + "\n")

    @staticmethod
    def read(out: Path) -> "Manifest":
        """Raises `CacheError` if it is missing, unreadable or of another version."""
        path = out / MANIFEST
        if not out.exists():
            raise CacheError(f"no cache at {out}: make one with: erw prepare IMAGES --out {out}")
        if not path.is_file():
            state = "an unfinished cache" if (out / SETTINGS).exists() else "no cache"
            raise CacheError(
                f"{out} is {state} ({MANIFEST} is missing): run erw prepare IMAGES --out {out}"
            )
        try:
            found = json.loads(path.read_text())
            version = found["version"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CacheError(f"{path} is damaged ({error}): remove it and prepare again") from error
        if version != VERSION:
            raise CacheError(
                f"{path} has version {version}, this erw reads {VERSION}: prepare it again"
            )
        try:
            found["shards"] = tuple(_shard(shard) for shard in found["shards"])
            for key in ("class_names", "class_counts", "latent_shape", "latent_mean", "latent_std"):
                found[key] = tuple(found[key])
            return Manifest(**found)
        except (KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}): remove it and prepare again") from error


def join(settings: dict[str, Any], class_names: tuple[str, ...], records: list[Record]) -> Manifest:
    """The manifest of all records, in shard order."""
    records = sorted(records, key=lambda record: record.shard.index)
    counts = [0] * max(1, len(class_names))
    for record in records:
        for label, count in record.label_counts.items():
            counts[int(label)] += count
    sums = [record.latent_sums for record in records if record.shard.rows]
    number = sum(s[2][0] for s in sums)
    assert number > 0, "a cache without rows is refused before it is joined"
    first = [sum(column) / number for column in zip(*(s[0] for s in sums), strict=True)]
    second = [sum(column) / number for column in zip(*(s[1] for s in sums), strict=True)]
    fidelity = {}
    for encoder in settings["encoders"]:
        name = encoder["name"]
        parts = [record.fidelity[name] for record in records if record.shard.rows]
        mean = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        fidelity[name] = {"mean": mean, "min": min(part[2] for part in parts)}
    return Manifest(
        version=VERSION,
        settings=settings,
        rows=sum(record.shard.rows for record in records),
        rejected=sum(len(record.rejected) for record in records),
        class_names=class_names,
        class_counts=tuple(counts),
        latent_shape=tuple(settings["latent_shape"]),
        latent_mean=tuple(first),
        latent_std=tuple(max(0.0, b - a * a) ** 0.5 for a, b in zip(first, second, strict=True)),
        fidelity=fidelity,
        shards=tuple(record.shard for record in records),
    )


def rejected_lines(records: list[Record]) -> str:
    """The text of `rejected.jsonl`."""
    rows = sorted(tuple(row) for record in records for row in record.rejected)
    return "".join(
        json.dumps({"item": item, "path": path, "reason": reason}, ensure_ascii=False) + "\n"
        for item, path, reason in rows
    )


def record_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.json"


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def _shard(found: dict[str, Any]) -> Shard:
    files = tuple(Written(**f) if isinstance(f, dict) else Written(*f) for f in found.pop("files"))
    return Shard(files=files, **found)
