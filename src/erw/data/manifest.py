"""What a cache says about itself: `manifest.json`, joined from one small record per shard.

cache/
  prepare.json            the settings it is being made with (from the first moment)
  shards/00000.safetensors         labels and latents of shard 0
  shards/00000.images.safetensors  its cropped images, if they are kept
  shards/00000.1.safetensors       its features of encoder 1
  shards/00000.json                its record, and 00000.1.json if that encoder was added later
  shards/pca.1.safetensors, shards/pca.1.json      what those are reduced with, if they are
  manifest.json           written last: a cache without it is unfinished
  rejected.jsonl          images left out, with path and reason
  report.json             how long it took; not part of the cache's identity
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from erw.data.shards import Written
from erw.errors import CacheError
from erw.io import write_text

VERSION = 2
MANIFEST, SETTINGS, REJECTED, REPORT = (
    "manifest.json",
    "prepare.json",
    "rejected.jsonl",
    "report.json",
)
CHECK = "check"  # of a manifest: the hash of the rest
IMAGES = "images"


@dataclass(frozen=True)
class Shard:
    """One shard: source items `first` to `first + items`, less those rejected.

    `files` are beside each other under `shards/`; their columns together make up its rows. What
    a run does not read lies in files that it does not open, nor fetch from afar (`by_file`).
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
    pixels: str = ""  # blake3 of the cropped images of its rows

    def write(self, folder: Path, added: int | None = None) -> None:
        """Write to `record_file`."""
        path = folder / record_file(self.shard.index, added)
        write_text(path, json.dumps(asdict(self), sort_keys=True))

    @staticmethod
    def read(folder: Path, index: int, added: int | None = None) -> "Record | None":
        """The record of a shard whose files are all there and whole in size, else None."""
        try:
            found = json.loads((folder / record_file(index, added)).read_text())
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
    # encoder: file, bytes, blake3, variance kept and images of the fit, where features are reduced
    pca: dict[str, dict[str, Any]] = field(default_factory=dict)
    # {"shift", "scale"} a channel, where the VAE leaves them to the data
    scaling: dict[str, list[float]] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Written, ...]:
        """Every file that has a hash."""
        reductions = (Written(r["file"], r["bytes"], r["blake3"]) for r in self.pca.values())
        return (*(file for shard in self.shards for file in shard.files), *reductions)

    def write(self, out: Path) -> None:
        """Write `manifest.json` in canonical form: equal caches have equal bytes."""
        told = asdict(self)
        told[CHECK] = _check(told)
        write_text(out / MANIFEST, json.dumps(told, sort_keys=True, indent=1) + "\n")

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
            return Manifest.parse(path.read_bytes(), where=str(path))
        except OSError as error:
            raise CacheError(f"{path} is damaged ({error}): remove it and prepare again") from error

    @staticmethod
    def parse(text: bytes, *, where: str) -> "Manifest":
        """A manifest from what `write` wrote. Raises `CacheError`, which names `where` it lay."""
        try:
            found = json.loads(text)
            version = found["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{where} is damaged ({error}): remove it and prepare again"
            ) from error
        if version != VERSION:
            raise CacheError(
                f"{where} has version {version}, this erw reads {VERSION}: remove the cache and "
                "prepare it again"
            )
        try:
            if found.pop(CHECK) != _check(found):
                raise ValueError("it is not as it was written")
            found["shards"] = tuple(_shard(shard) for shard in found["shards"])
            for key in ("class_names", "class_counts", "latent_shape", "latent_mean", "latent_std"):
                found[key] = tuple(found[key])
            manifest = Manifest(**found)
            held = sum(shard.rows for shard in manifest.shards)
            if not manifest.rows == held == sum(manifest.class_counts):
                raise ValueError(f"{manifest.rows} rows, but {held} in its shards")
            return manifest
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{where} is damaged ({error}): remove it and prepare again"
            ) from error


def _check(told: dict[str, Any]) -> str:
    """blake3 of what a manifest says, as it is written and as it is read back."""
    return blake3(json.dumps(told, sort_keys=True).encode()).hexdigest()


def join(
    settings: dict[str, Any],
    class_names: tuple[str, ...],
    records: list[Record],
    *,
    pca: dict[str, dict[str, Any]],
) -> Manifest:
    """The manifest of all records, in shard order."""
    records = _merged(records)
    counts = [0] * max(1, len(class_names))
    for record in records:
        for label, count in record.label_counts.items():
            counts[int(label)] += count
    mean, deviation = _moments(records)
    scaling = {}
    if settings["vae"]["scale"] is None:
        # Of the images that it began with: what is appended must not move a model's latents.
        began = [r for r in records if r.shard.first < settings["source"]["count"]]
        shift, spread = _moments(began if any(r.shard.rows for r in began) else records)
        if min(spread) < 1e-6:  # what a posterior without variance has by its bounds
            raise CacheError(
                f"channel {spread.index(min(spread))} of the latents is the same everywhere: VAE "
                f"{settings['vae']['name']} cannot be scaled by their deviation"
            )
        scaling = {"shift": list(shift), "scale": [1 / value for value in spread]}
    return Manifest(
        version=VERSION,
        settings=settings,
        rows=sum(record.shard.rows for record in records),
        rejected=sum(len(record.rejected) for record in records),
        class_names=class_names,
        class_counts=tuple(counts),
        latent_shape=tuple(settings["latent_shape"]),
        latent_mean=mean,
        latent_std=deviation,
        fidelity={e["name"]: _fidelity(records, e["name"]) for e in settings["encoders"]},
        shards=tuple(record.shard for record in records),
        pca=pca,
        scaling=scaling,
    )


def _merged(records: list[Record]) -> list[Record]:
    """One record a shard, in order: those of encoders added later joined to the first one."""
    found: dict[int, Record] = {}
    for record in records:
        index = record.shard.index
        if old := found.get(index):
            shard = replace(old.shard, files=(*old.shard.files, *record.shard.files))
            record = replace(old, shard=shard, fidelity=old.fidelity | record.fidelity)
        found[index] = record
    return [found[index] for index in sorted(found)]


def _moments(records: list[Record]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each raw channel, over samples of the posterior."""
    sums = [record.latent_sums for record in records if record.shard.rows]
    number = sum(s[2][0] for s in sums)
    assert number > 0, "a cache without rows is refused before it is joined"
    first = [sum(column) / number for column in zip(*(s[0] for s in sums), strict=True)]
    second = [sum(column) / number for column in zip(*(s[1] for s in sums), strict=True)]
    spread = (max(0.0, b - a * a) ** 0.5 for a, b in zip(first, second, strict=True))
    return tuple(first), tuple(spread)


def _fidelity(records: list[Record], encoder: str) -> dict[str, float]:
    parts = [record.fidelity[encoder] for record in records if record.shard.rows]
    mean = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    return {"mean": mean, "min": min(part[2] for part in parts)}


def rejected_lines(records: list[Record]) -> str:
    """The text of `rejected.jsonl`."""
    rows = sorted(tuple(row) for record in records for row in record.rejected)
    return "".join(
        json.dumps({"item": item, "path": path, "reason": reason}, ensure_ascii=False) + "\n"
        for item, path, reason in rows
    )


Which = int | str | None
"""Which of a shard's files: the first, that of its images, or that of an encoder by its number."""


def by_file(columns: Iterable[str], encoders: Sequence[str]) -> dict[Which, list[str]]:
    """Names of columns by which of a shard's files they lie in, in a cache of these encoders."""
    found: dict[Which, list[str]] = {}
    for column in columns:
        _, _, name = column.partition(".")
        which = IMAGES if column == "image" else encoders.index(name) if name else None
        found.setdefault(which, []).append(column)
    return found


def shard_file(index: int, which: Which = None) -> str:
    """The name of one of a shard's files."""
    return f"{index:05d}{'' if which is None else f'.{which}'}.safetensors"


def record_file(index: int, added: int | None = None) -> str:
    """The name of a shard's record, or of that of an encoder which was added later."""
    return shard_file(index, added).replace(".safetensors", ".json")


def _shard(found: dict[str, Any]) -> Shard:
    files = tuple(Written(**f) if isinstance(f, dict) else Written(*f) for f in found.pop("files"))
    return Shard(files=files, **found)
