"""What every source of images is, and the named files that most of them read."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import splitext
from typing import Any

import numpy as np
from blake3 import blake3

from erw.data.images import WHITE, decode

# Beginnings of what systems put beside people's own files, and of all that is hidden.
_SYSTEM = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "#recycle", "lost+found")


class Source:
    """A fixed list of labelled images. A subclass sets these and gives `read` or `__getitem__`."""

    name: str
    class_names: tuple[str, ...]  # () without classes; every label is then 0
    labels: np.ndarray  # int32 (N,)
    background: tuple[int, int, int] = WHITE
    notes: Sequence[str] = ()  # what was not used
    _fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """uint8 (H, W, 3) and label. Raises `Unreadable` for a bad image."""
        return decode(self.read(index), background=self.background), int(self.labels[index])

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises `Unreadable`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes when the list of images, their labels or the sizes of the files do."""
        return self._fingerprint

    def location(self, index: int) -> str:
        """The place of image `index`, for messages."""
        return f"{self.name}[{index}]"


@dataclass
class Files:
    """Named files: below a folder, or inside archives. Reading from several threads is safe."""

    root: Path
    name: str
    entries: dict[str, str]  # path inside -> size and checksum; becomes sorted, without hidden ones
    read: Callable[[str], bytes]
    location: Callable[[str], str]  # the place of a file, for messages
    notes: Sequence[str] = ()  # what cannot be read
    inside: Callable[[str], str] = str  # the path whose folders may name the class

    def __post_init__(self) -> None:
        self.entries = {k: self.entries[k] for k in sorted(self.entries) if not hidden(k)}


def hidden(key: str) -> bool:
    """True for what no person put there: .git, ._x.jpg, __MACOSX, the folders of a NAS."""
    return any(part.startswith(_SYSTEM) for part in key.split("/"))


def ending(key: str) -> str:
    """The last ending of a path in small letters, with its dot: ".jpg"; "" without one."""
    return splitext(key)[1].lower()


def digest(header: Any, lines: Iterable[str]) -> str:
    """Fingerprint of a JSON value and lines of text. File names in them need not be UTF-8."""
    hashed = blake3(json.dumps(header).encode())
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:32]


def overview(source: Source) -> list[str]:
    """Lines for people: images and classes; then what was left alone."""
    names, notes = source.class_names, list(source.notes)
    line = f"{len(source):,} images of {source.name}, "
    if not names:
        return [line + "no classes: the set is unconditional", *notes]
    line += f"{len(names):,} classes ({listed(names)})"
    if hasattr(source, "labels"):
        counts = np.bincount(source.labels, minlength=len(names))
        line += f" of {counts.min():,} to {counts.max():,} images"
        if empty := [names[i] for i in np.flatnonzero(counts == 0)]:
            notes.append(f"{len(empty)} classes have no image ({listed(empty)})")
    return [line, *notes]


def listed(items: Sequence[Any]) -> str:
    """The first few items, with commas."""
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
