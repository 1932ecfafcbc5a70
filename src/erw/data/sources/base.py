"""What every source of images is, and the files that most of them read."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from posixpath import splitext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from blake3 import blake3

from erw.data.images import WHITE, decode

# Folders and files that systems put beside people's own, and everything with a dot in front.
_SYSTEM = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "#recycle", "lost+found")


@runtime_checkable
class Source(Protocol):
    """A fixed list of labelled images.

    `class_names` is empty when there are no classes; every label is then 0. `source[i]` is
    (uint8 (H, W, 3), label) and raises `Unreadable` for a bad image. `fingerprint()` changes when
    the list, the labels or the sizes of the files do. Optional: `labels` (int array (N,)), `notes`
    (lines about what was not used) and `location(i) -> str` (the place of image i, for messages).
    """

    name: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]: ...

    def fingerprint(self) -> str: ...


class LabelledImages:
    """Base of sources with all labels in memory: a subclass sets these and gives `read`."""

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 (N,)
    background: tuple[int, int, int] = WHITE
    notes: tuple[str, ...] = ()
    _fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return decode(self.read(index), background=self.background), int(self.labels[index])

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises `Unreadable`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of what identifies the images, of their labels and the background colour."""
        return self._fingerprint


class Entry(NamedTuple):
    """One file: its path inside, size in bytes, and what marks its content (a checksum)."""

    key: str
    size: int
    stamp: str = ""


class Files:
    """Base of named files: below a folder, or inside archives. `notes`: what cannot be read."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, root.resolve().name
        self.notes: list[str] = []

    @cached_property
    def entries(self) -> list[Entry]:
        """All files but hidden ones, sorted by key."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        raise NotImplementedError

    def inside(self, key: str) -> str:
        """The path whose folders may name the class."""
        return key

    def location(self, key: str) -> str:
        """The place of a file, for messages."""
        return f"{self.root}!{key}"


def ending(key: str) -> str:
    """The last ending of a path in small letters, with its dot: ".jpg"; "" without one."""
    return splitext(key)[1].lower()


def hidden(key: str) -> bool:
    """True for what no person put there: .git, ._x.jpg, __MACOSX, the folders of a NAS."""
    return any(part.startswith(_SYSTEM) for part in key.split("/"))


def digest(header: Any, lines: Iterable[str]) -> str:
    """Fingerprint of a JSON value and lines of text. File names in them need not be UTF-8."""
    hashed = blake3(json.dumps(header).encode())
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:32]


def location(source: Source, index: int) -> str:
    """The place of image `index`, for messages: its path, or name and number."""
    return source.location(index) if hasattr(source, "location") else f"{source.name}[{index}]"


def overview(source: Source) -> list[str]:
    """Lines for people: images and classes; then what was left alone, and what to do about it."""
    names, notes = source.class_names, list(getattr(source, "notes", ()))
    line = f"{len(source):,} images of {source.name}"
    if not names:
        return [f"{line}, no classes: the set is unconditional", *notes]
    line += f", {len(names):,} classes ({listed(names)})"
    if (labels := getattr(source, "labels", None)) is not None:
        counts = np.bincount(labels, minlength=len(names))
        line += f" of {counts.min():,} to {counts.max():,} images"
        if empty := [names[i] for i in np.flatnonzero(counts == 0)]:
            notes.append(f"{len(empty)} classes have no image ({listed(empty)})")
    return [line, *notes]


def listed(items: Sequence[Any], most: int = 4) -> str:
    """The first few items, with commas."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
