"""Images in files of their own: below a folder, inside a zip archive, or any other `Files`."""

import lzma
import os
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

from erw.data.images import WHITE, Unreadable
from erw.data.sources.base import Entry, Files, LabelledImages, digest, hidden
from erw.data.sources.labels import find
from erw.errors import DataError, one_line


class FileSource(LabelledImages):
    """The images among some `Files`, in the order of their paths; see `open_source`."""

    def __init__(
        self,
        files: Files,
        *,
        classes: str = "auto",
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.files, self.background = files, background
        self.name = files.name
        notes: list[str] = []
        self.keys, (self.class_names, labels) = find(files, classes, notes)
        self.labels = np.asarray(labels, dtype=np.int32)
        if not self.keys:
            what = notes[0] if notes else "expected images, or folders of images"
            raise DataError(f"no images in {files.root}: {what}; Pillow's image formats are read")
        self.notes = (*notes, *files.notes)
        entries = {entry.key: entry for entry in files.entries}
        images = [entries[key] for key in self.keys]
        self._fingerprint = digest(
            [self.class_names, background],
            (f"{e.key}\0{e.size}\0{e.stamp}\0{n}\n" for e, n in zip(images, labels, strict=True)),
        )

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. Raises `Unreadable`."""
        try:
            return self.files.read(self.keys[index])
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or error})") from error

    def location(self, index: int) -> str:
        """The path of image `index`."""
        return self.files.location(self.keys[index])


class Folder(Files):
    """The files below a folder."""

    @cached_property
    def entries(self) -> list[Entry]:
        """Every file, links followed; each real folder is entered once, by its real path first."""
        entries: list[Entry] = []
        empty: list[str] = []
        seen: set[str] = set()
        real, links = [str(self.root)], list[str]()
        top = os.path.join(self.root, "")
        while real or links:
            folder = real.pop() if real else links.pop(0)
            if (path := os.path.realpath(folder)) in seen:
                continue
            seen.add(path)
            with os.scandir(folder) as listing:
                items = sorted((i for i in listing if not hidden(i.name)), key=lambda i: i.name)
            if not items and folder != str(self.root):
                empty.append(os.path.relpath(folder, self.root))
            for item in items:
                if item.is_dir():
                    (links if item.is_symlink() else real).append(item.path)
                elif item.is_file() or item.is_symlink():  # a link to nothing: reading it fails
                    size = item.stat().st_size if item.is_file() else 0
                    entries.append(Entry(item.path[len(top) :], size))
        if empty:
            self.notes = [f"{len(empty)} empty folders are no classes (such as {min(empty)})"]
        return sorted(entries)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def location(self, key: str) -> str:
        return str(self.root / key)


class Zip(Files):
    """The files inside a zip archive. Reading from several threads is safe."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{path} is not a whole zip archive ({one_line(error)}): copy it again"
            ) from error
        # Of members of equal path the last counts, as unpacking would have it. Some tools write
        # backslashes, or ./ in front.
        members = [info for info in self._archive.infolist() if not info.is_dir()]
        self._members = {m.filename.replace("\\", "/").removeprefix("./"): m for m in members}

    @cached_property
    def entries(self) -> list[Entry]:
        members = ((key, info) for key, info in self._members.items() if not hidden(key))
        return sorted(Entry(key, info.file_size, f"{info.CRC:08x}") for key, info in members)

    def read(self, key: str) -> bytes:
        try:
            return self._archive.read(self._members[key])
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
            # RuntimeError: encrypted, or packed in a way that is not implemented.
            raise Unreadable(f"damaged inside the archive ({one_line(error, 120)})") from error
