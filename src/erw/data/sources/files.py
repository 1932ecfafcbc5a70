"""What a source is, and those of files: below a folder, or inside zip and tar archives."""

import json
import os
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from erw.data.images import WHITE, Unreadable, decode
from erw.data.sources.labels import Files, find, hidden, listed
from erw.errors import DataError, raised_as


class Source:
    """A fixed list of labelled images. A subclass sets these and gives `read` or `__getitem__`."""

    name: str
    class_names: tuple[str, ...]  # () without classes; every label is then 0
    labels: np.ndarray  # int32 (N,)
    notes: Sequence[str] = ()  # what was not used
    _fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """uint8 (H, W, 3) and label. Raises `Unreadable` for a bad image."""
        return decode(self.read(index)), int(self.labels[index])

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises `Unreadable`."""
        raise NotImplementedError

    def class_counts(self, without: Sequence[int] = ()) -> tuple[int, ...]:
        """Images of each class, apart from those of some numbers; () without classes."""
        labels, classes = np.delete(self.labels, list(without)), len(self.class_names)
        return tuple(np.bincount(labels, minlength=classes).tolist()) if classes else ()

    def fingerprint(self) -> str:
        """Changes when the list of images, their labels or the sizes of the files do."""
        return self._fingerprint

    def origin(self, index: int) -> object:
        """What image `index` was made from; images of one origin say little about each other."""
        return index

    def location(self, index: int) -> str:
        """The place of image `index`, for messages."""
        return f"{self.name}[{index}]"


def digest(header: Any, lines: Iterable[str]) -> str:
    """Fingerprint of a JSON value and lines of text. File names in them need not be UTF-8."""
    hashed = blake3(json.dumps(header).encode())
    for line in lines:
        hashed.update(line.encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:32]


def overview(images: Any) -> list[str]:
    """Lines for people on a source or a cache: images and classes; then what was left alone."""
    line, names = f"{len(images):,} images of {images.name}, ", images.class_names
    if not names:
        return [line + "no classes: the set is unconditional", *images.notes]
    line += f"{len(names):,} classes ({listed(names)})"
    counts = images.class_counts() or ()  # an older cache at a URL does not say
    line += f" of {min(counts):,} to {max(counts):,} images" if counts else ""
    empty = [name for name, count in zip(names, counts, strict=False) if not count]
    note = f"classes without images: {len(empty)} ({listed(empty)})"
    return [line, *[note] * bool(empty), *images.notes]


class FileSource(Source):
    """The images among some `Files`, in the order of their paths; see `open_source`."""

    def __init__(self, files: Files, *, classes: str = "auto") -> None:
        self.files, self.name = files, files.name
        self.keys, (self.class_names, self.labels), self.notes = find(files, classes)
        pairs = zip(self.keys, self.labels, strict=True)
        lines = (f"{key}\0{files.entries[key]}\0{label}\n" for key, label in pairs)
        self._fingerprint = digest([self.class_names, WHITE], lines)

    def read(self, index: int) -> bytes:
        with raised_as(Unreadable, "cannot be read"):
            return self.files.read(self.keys[index])

    def location(self, index: int) -> str:
        return self.files.location(self.keys[index])


def folder(root: Path) -> Files:
    """The files below a folder, links followed, each real folder once."""
    entries, seen, errors = dict[str, str](), set[str](), list[OSError]()
    tops, start = [str(root)], len(os.path.join(root, ""))
    for top in tops:  # grows by links to folders: real folders count before links to them
        links = list[str]()
        for path, folders, names in os.walk(top, onerror=errors.append):
            real = os.path.realpath(path)
            folders[:] = [] if real in seen else sorted(x for x in folders if not hidden(x))
            for name in [] if real in seen else names:
                file = os.path.join(path, name)  # a link to nothing fails when it is read
                size = os.path.getsize(file) if os.path.exists(file) else 0
                entries[file[start:]] = f"{size}\0"
            links += (x for folder in folders if os.path.islink(x := os.path.join(path, folder)))
            seen.add(real)
        tops += sorted(links, key=lambda link: link.split(os.sep))
    if errors:
        raise errors[0]
    return Files(
        root, root.resolve().name, entries, lambda key: (root / key).read_bytes(),
        lambda key: str(root / key),
    )  # fmt: skip


def zipped(path: Path) -> Files:
    """The files inside a zip archive."""
    with raised_as(DataError, f"{path} is not a whole zip archive, copy it again"):
        archive = zipfile.ZipFile(path)
    # Of members of equal path the last counts, as in unpacking. Some tools write \, or ./ in front.
    infos = [info for info in archive.infolist() if info.filename and not info.is_dir()]
    members = {m.filename.replace("\\", "/").removeprefix("./"): m for m in infos}
    entries = {key: f"{m.file_size}\0{m.CRC:08x}" for key, m in members.items()}
    return Files(
        path, path.resolve().name, entries, lambda key: archive.read(members[key]),
        lambda key: f"{path}!{key}",
    )  # fmt: skip


def tars(paths: Sequence[Path]) -> Files:
    """The files inside uncompressed tar archives; of several, a key begins with the archive's name.

    Of members of equal path the last counts, as tar has it; links are left alone.
    """
    members: dict[str, tuple[str, Path, int, int]] = {}  # path inside, archive, first byte, size
    common, sparse = os.path.commonpath([path.parent for path in paths]), list[str]()
    for path in paths:
        prefix = f"{os.path.relpath(path, common)}/" if len(paths) > 1 else ""
        problem = f"{path} is not a whole, uncompressed tar archive, copy it again or uncompress it"
        with raised_as(DataError, problem), tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.issparse():
                    sparse.append(f"{path}: {name}")
                if member.isfile():
                    members[prefix + name] = name, path, member.offset_data, member.size
            # Cut at a header, an archive lacks the empty block of its end.
            _bytes(path, archive.offset, 512)
    if sparse:
        more = f" and {len(sparse) - 1} others are" if len(sparse) > 1 else " is"
        hint = "pack the archive again without -S (--sparse)"
        raise DataError(f"{sparse[0]}{more} stored without its zeros, which is not read: {hint}")
    name = paths[0].parent.name if len(paths) > 1 else paths[0].name
    entries = {key: f"{size}\0" for key, (*_, size) in members.items()}
    return Files(
        paths[0], name, entries, lambda key: _bytes(*members[key][1:]),
        lambda key: "{1}!{0}".format(*members[key]), lambda key: members[key][0],
    )  # fmt: skip


def _bytes(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file, opened anew: a thousand archives would exceed the open files."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        if len(data := file.read(size)) != size:
            raise EOFError("cut short")
    return data
