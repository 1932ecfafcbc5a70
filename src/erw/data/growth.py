"""What a cache is made of: the images it began with, those appended, encoders added later.

All of it follows from its settings. A cache that was never grown has `source` and `encoders`;
`appended` lists further sources, `class_names` then all classes; an encoder that was added has
`beside`, the number of sources that were there already, whose features lie in files of their own.
"""

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from erw.data.claims import Claims
from erw.data.images import Unreadable
from erw.data.manifest import IMAGES, MANIFEST, Manifest, Record, Shard, record_file, shard_file
from erw.data.rows import Span
from erw.data.shards import ShardReader, hash_file
from erw.data.sources import FileSource, Source
from erw.data.sources import where as place
from erw.errors import CacheError, DataError
from erw.io import remove_partial

SAME = ("weight_hash", "dim", "grid", "format", "pca", "class_dim")
"""What an encoder that a cache has already must have in common with one that is to be added."""


def sources(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, fingerprint and count of each source, in the order of their rows."""
    return [settings["source"], *settings.get("appended", [])]


def spans(settings: dict[str, Any]) -> list[Span]:
    """All that a cache is made of, shard by shard; each source begins a new shard."""
    found: list[Span] = []
    first, shard, rows = 0, 0, settings["rows_per_shard"]
    for number, source in enumerate(sources(settings)):
        stop = first + source["count"]
        told = enumerate(settings["encoders"])
        added = [i for i, encoder in told if number < encoder.get("beside", 0)]
        for start in range(first, stop, rows):
            end = min(start + rows, stop)
            found += [Span(shard, start, end, number, encoder) for encoder in (None, *added)]
            shard += 1
        first = stop
    return found


def append(out: Path, settings: dict[str, Any], source: Source, told: dict[str, Any]) -> dict:
    """Settings of the cache in `out` with one more source.

    Classes are matched by name: names that the cache has keep their labels, new ones come after
    them. Raises `CacheError` if one of the two has classes and the other none.
    """
    names = finished(out, settings).class_names
    if isinstance(source, FileSource) and source.name in [s["name"] for s in sources(settings)]:
        raise CacheError(
            f"{out} has images of another {source.name}: if some were put into it since, give "
            "those alone, in a folder of their own; if it is another, give it by another name"
        )
    if bool(names) != bool(source.class_names):
        has, what = (len(names), "none") if names else ("no", str(len(source.class_names)))
        raise CacheError(
            f"{out} has {has} classes and {source.name} {what}: "
            + ("sort its images into class folders" if names else "append with --classes none")
        )
    names = (*names, *(name for name in source.class_names if name not in names))
    return settings | {
        "appended": [*settings.get("appended", []), told],
        "class_names": list(names),
    }


def add(out: Path, settings: dict[str, Any], encoders: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings of the cache in `out` with more encoders, whose features come beside what is there.

    Encoders that it has already are left as they are. Raises `CacheError` if one was stored
    otherwise.
    """
    before = {encoder["name"]: encoder for encoder in settings["encoders"]}
    new = []
    for told in encoders:
        if (old := before.get(told["name"])) is None:
            new.append(told | {"beside": len(sources(settings))})
        elif other := [k for k in SAME if old.get(k) != told.get(k)]:
            raise CacheError(
                f"{out} has features of {told['name']} already, with another {other[0]} "
                f"({old.get(other[0])}, now {told.get(other[0])})"
            )
    if not new:
        return settings
    finished(out, settings)
    return settings | {"encoders": [*settings["encoders"], *new]}


def finished(out: Path, settings: dict[str, Any]) -> Manifest:
    """The manifest of a cache that nothing is missing of; `CacheError` if something is."""
    manifest = Manifest.read(out)
    if manifest.settings != settings:
        before, now = ([*sources(s), *s["encoders"]] for s in (manifest.settings, settings))
        new = [told["name"] for told in now if told not in before]
        raise CacheError(
            f"{out} is still being grown (by {', '.join(new)}): finish that first, with the same "
            "command as before, or forget it with --abandon"
        )
    for span in spans(settings):
        if Record.read(out / "shards", span.shard, span.added) is None:
            name = record_file(span.shard, span.added)
            raise CacheError(
                f"{out}: {name} or what it tells of is damaged: erw prepare --repair first"
            )
    return manifest


def abandon(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Remove what was added to the cache in `out` and not finished; settings of what is left.

    Raises `CacheError` if another process is still at it, or what came first is not finished.
    """
    manifest = Manifest.read(out)
    folder, before = out / "shards", set(spans(manifest.settings))
    new = [span for span in spans(settings) if span not in before]
    with Claims(folder) as claims:
        if not all(claims.take(span.shard, span.added) for span in new):
            raise CacheError(f"another process is adding to {out}: stop it first")
        for span in new:
            names = [record_file(span.shard, span.added), *span.files(settings)]
            for name in names:
                (folder / name).unlink(missing_ok=True)
            remove_partial(folder, names)
        for number in range(len(manifest.settings["encoders"]), len(settings["encoders"])):
            for file in folder.glob(f"pca.{number}.*"):
                file.unlink()
    return manifest.settings


class Part:
    """A source as part of a cache: its images numbered from `first`, labels by class name."""

    def __init__(self, source: Source, *, first: int, class_names: tuple[str, ...]) -> None:
        self.source, self.first, self.class_names = source, first, class_names
        self.name, self.notes = source.name, getattr(source, "notes", ())
        self._labels = [class_names.index(name) for name in source.class_names] or [0]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        image, label = self.source[number - self.first]
        if not 0 <= label < len(self._labels):
            raise DataError(
                f"{self.where(number)} has label {label}, but there are {len(self._labels)} classes"
            )
        return image, self._labels[label]

    def where(self, number: int) -> str:
        """Where an image lies, for messages."""
        return place(self.source, number - self.first)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class Stored:
    """The cropped images in the rows of a cache, by the numbers that they had in its sources."""

    def __init__(self, out: Path) -> None:
        manifest = Manifest.read(out)
        self.name, self.class_names = out.name, manifest.class_names
        self._folder = out / "shards"
        self._shards, self._identity = manifest.shards, hash_file(out / MANIFEST)
        self._firsts = [shard.first for shard in manifest.shards]
        self._shard = lru_cache(maxsize=8)(self._open)

    def __len__(self) -> int:
        return sum(shard.items for shard in self._shards)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        images, rows, labels = self._shard(bisect_right(self._firsts, number) - 1)
        if number not in rows:
            raise Unreadable("rejected when the cache was made")
        image = images.values("image")[rows[number]]
        return np.ascontiguousarray(image.transpose(1, 2, 0)), labels[number]

    def fingerprint(self) -> str:
        """Of the cache that they lie in."""
        return self._identity

    def where(self, number: int) -> str:
        """Where an image lies, for messages."""
        shard = self._shards[bisect_right(self._firsts, number) - 1]
        return f"{self._folder / shard_file(shard.index, IMAGES)}[item {number}]"

    def _open(self, place: int) -> tuple[ShardReader, dict[int, int], dict[int, int]]:
        shard = self._shards[place]
        images = ShardReader(self._folder / shard_file(shard.index, IMAGES), rows=shard.rows)
        pairs = _marks(self._folder, shard)
        rows = {item: row for row, (item, _) in enumerate(pairs)}
        return images, rows, dict(pairs)


def held(folder: Path, span: Span) -> Span:
    """The span with item and label of each row that its shard has."""
    record = Record.read(folder, span.shard)
    assert record is not None, "asked for before the shard was there"
    if not record.shard.rows:
        return span._replace(held=())
    return span._replace(pixels=record.pixels, held=tuple(_marks(folder, record.shard)))


def _marks(folder: Path, shard: Shard) -> list[tuple[int, int]]:
    """Item and label of each row of a shard."""
    reader = ShardReader(folder / shard_file(shard.index), rows=shard.rows)
    columns = (reader.values(name).tolist() for name in ("item", "label"))
    return list(zip(*columns, strict=True))
