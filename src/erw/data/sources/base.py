"""What every source of images is, and the list of files that most of them read."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
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
    (lines about what was not used) and `where(i) -> str` (the place of image i, for messages).
    """

    name: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]: ...

    def fingerprint(self) -> str: ...


class EncodedImages:
    """Base of sources whose images are encoded files: `read(i)` gives bytes, `where(i)` a place."""

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

    def where(self, index: int) -> str:
        """The place of image `index`, for messages."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of what identifies the images and of their labels."""
        return self._fingerprint


class Entry(NamedTuple):
    """One file: its path inside, size in bytes, and what marks its content (a checksum)."""

    key: str
    size: int
    stamp: str = ""


class Files(Protocol):
    """Files by path: below a folder, or inside archives.

    `entries` lists them in the order of their keys, hidden ones left out. The folders of
    `inside(key)` name the class of an image. `notes` are lines about what cannot be read.
    """

    root: Path
    notes: list[str]

    @cached_property
    def entries(self) -> list[Entry]: ...

    def read(self, key: str) -> bytes: ...

    def where(self, key: str) -> str: ...

    def inside(self, key: str) -> str: ...


def ending(key: str) -> str:
    """The last ending of a path in small letters, with its dot: ".jpg"; "" without one."""
    return PurePosixPath(key).suffix.lower()


def hidden(key: str) -> bool:
    """True for what no person put there: .git, ._x.jpg, __MACOSX, the folders of a NAS."""
    return any(part.startswith(_SYSTEM) for part in key.split("/"))


def digest(header: Any, lines: Iterable[str]) -> str:
    """Fingerprint of a JSON value and lines of text. File names in them need not be UTF-8."""
    hashed = blake3(json.dumps(header).encode())
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:32]


def where(source: Source, index: int) -> str:
    """The place of image `index`, for messages: its path, or name and number."""
    return source.where(index) if hasattr(source, "where") else f"{source.name}[{index}]"


def overview(source: Source) -> list[str]:
    """Lines for people: images and classes; then what was left alone, and what to do about it."""
    names = source.class_names
    first = f"{len(source):,} images of {source.name}"
    if not names:
        return [f"{first}, no classes: the set is unconditional", *getattr(source, "notes", ())]
    some = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    first += f", {len(names):,} classes ({some})"
    lines = list(getattr(source, "notes", ()))
    if (labels := getattr(source, "labels", None)) is not None:
        counts = np.bincount(labels, minlength=len(names))
        low, high = int(counts.min()), int(counts.max())
        first += f" of {low:,} images each" if low == high else f" of {low:,} to {high:,} images"
        if empty := [names[i] for i in np.flatnonzero(counts == 0)]:
            lines.append(f"{len(empty)} classes have no image ({listed(empty)})")
    return [first, *lines]


def listed(items: Sequence[Any], most: int = 4) -> str:
    """The first few items, with commas."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")
