"""Images in files of their own: below a folder, or inside zip and tar archives, read in place."""

import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from erw.data.images import WHITE, Unreadable
from erw.data.sources.base import Source, digest
from erw.data.sources.labels import find
from erw.errors import DataError, one_line

# Beginnings of what systems put beside people's own files, and of all that is hidden.
_SYSTEM = (".", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "#recycle", "lost+found")


class Files:
    """Named files: below a folder, or inside archives.

    Attributes:
        entries: path inside -> what marks the content (size, checksum), sorted; none is hidden.
        notes: lines about what cannot be read.
    """

    def __init__(self, root: Path, name: str = "") -> None:
        self.root, self.name = root, name or root.resolve().name
        self.notes: list[str] = []
        self.entries = dict(sorted((k, v) for k, v in self._entries() if not hidden(k)))

    def _entries(self) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        raise NotImplementedError

    def inside(self, key: str) -> str:
        """The path whose folders may name the class."""
        return key

    def location(self, key: str) -> str:
        """The place of a file, for messages."""
        return f"{self.root}!{key}"


class FileSource(Source):
    """The images among some `Files`, in the order of their paths; see `open_source`."""

    def __init__(
        self,
        files: Files,
        *,
        classes: str = "auto",
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.files, self.background, self.name = files, background, files.name
        notes: list[str] = []
        self.keys, (self.class_names, labels) = find(files, classes, notes)
        if not self.keys:
            what = notes[0] if notes else "expected images, or folders of images"
            raise DataError(f"no images in {files.root}: {what}; Pillow's image formats are read")
        self.labels = np.asarray(labels, dtype=np.int32)
        self.notes = (*notes, *files.notes)
        self._fingerprint = digest(
            [self.class_names, background],
            (f"{k}\0{files.entries[k]}\0{n}\n" for k, n in zip(self.keys, labels, strict=True)),
        )

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. Raises `Unreadable`."""
        try:
            return self.files.read(self.keys[index])
        except Exception as error:  # of a zip: encrypted, damaged, another kind of compression
            raise Unreadable(f"cannot be read ({one_line(error)})") from error

    def location(self, index: int) -> str:
        return self.files.location(self.keys[index])


class Folder(Files):
    """The files below a folder, links followed: each real folder once, by its real path first."""

    def _entries(self) -> Iterator[tuple[str, str]]:
        roots, seen, empty = [str(self.root)], set[str](), list[str]()
        for root in roots:  # links join the end while they are found
            for path, folders, names in os.walk(root, onerror=_fail):
                if (real := os.path.realpath(path)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(folder for folder in folders if not hidden(folder))
                roots += [p for f in folders if os.path.islink(p := os.path.join(path, f))]
                inside = os.path.relpath(path, self.root)
                if inside != "." and not folders and all(map(hidden, names)):
                    empty.append(inside)
                for name in names:
                    file = os.path.join(path, name)  # a link to nothing fails when it is read
                    size = os.path.getsize(file) if os.path.exists(file) else 0
                    yield name if inside == "." else f"{inside}/{name}", f"{size}\0"
        if empty:
            self.notes = [f"{len(empty)} empty folders are no classes (such as {min(empty)})"]

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def location(self, key: str) -> str:
        return str(self.root / key)


class Zip(Files):
    """The files inside a zip archive. Reading from several threads is safe."""

    def _entries(self) -> Iterator[tuple[str, str]]:
        try:
            self._archive = zipfile.ZipFile(self.root)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{self.root} is not a whole zip archive ({one_line(error)}): copy it again"
            ) from error
        # Of members of equal path the last counts, as unpacking would have it. Some tools write
        # backslashes, or ./ in front.
        members = [info for info in self._archive.infolist() if not info.is_dir()]
        self._members = {m.filename.replace("\\", "/").removeprefix("./"): m for m in members}
        for key, info in self._members.items():
            yield key, f"{info.file_size}\0{info.CRC:08x}"

    def read(self, key: str) -> bytes:
        return self._archive.read(self._members[key])


class Tars(Files):
    """The files inside one or more uncompressed tar archives; safe from any thread.

    Headers are read once. Of several archives, a key begins with the archive's name. Of members of
    equal path the last counts, as tar has it; links are left alone.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._links = paths, 0
        self._places: dict[str, tuple[Path, int, int, int]] = {}  # archive, key's prefix, bytes
        super().__init__(paths[0], paths[0].parent.name if len(paths) > 1 else paths[0].name)
        if self._links:
            self.notes = [f"{self._links} links inside archives are left alone"]

    def _entries(self) -> Iterator[tuple[str, str]]:
        common = os.path.commonpath([path.parent for path in self._paths])
        for path in self._paths:
            try:
                self._index(path, f"{os.path.relpath(path, common)}/")
            except (tarfile.TarError, EOFError, OSError) as error:
                raise DataError(
                    f"{path} is not a whole, uncompressed tar archive ({one_line(error)}): copy it "
                    "again, or uncompress it"
                ) from error
        return ((key, f"{size}\0") for key, (_, _, _, size) in self._places.items())

    def _index(self, path: Path, prefix: str) -> None:
        """Note where each member lies."""
        prefix, end = prefix if len(self._paths) > 1 else "", 0
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = max(end, archive.offset)  # of the next header
                name = member.name.removeprefix("./")
                if hidden(name):
                    continue
                if member.issparse():
                    raise DataError(
                        f"{path}!{name} is stored without its empty blocks (tar --sparse), which "
                        "is not read: pack it again without that option"
                    )
                self._links += member.islnk() or member.issym()
                if member.isfile():
                    start, size = member.offset_data, member.size
                    self._places[prefix + name] = (path, len(prefix), start, size)
                    end = max(end, -(-(start + size) // 512) * 512)
        # An archive cut at a header looks like a shorter one: a whole one ends with empty blocks.
        if _bytes(path, end, 512) != bytes(512):
            raise DataError(f"{path} is cut short: copy it again")

    def read(self, key: str) -> bytes:
        path, _, start, size = self._places[key]
        return _bytes(path, start, size)

    def location(self, key: str) -> str:
        return f"{self._places[key][0]}!{self.inside(key)}"

    def inside(self, key: str) -> str:
        return key[self._places[key][1] :]


def hidden(key: str) -> bool:
    """True for what no person put there: .git, ._x.jpg, __MACOSX, the folders of a NAS."""
    return any(part.startswith(_SYSTEM) for part in key.split("/"))


def _bytes(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file, opened anew: a thousand archives would exceed the open files."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise EOFError("cut short")
    return data


def _fail(error: Any) -> NoReturn:
    raise error
