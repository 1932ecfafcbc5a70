"""Named bytes: what lies below a folder or inside a zip archive."""

import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from erw.data.images import Unreadable
from erw.errors import DataError


class Entry(NamedTuple):
    """One file of a collection: its path inside, size in bytes, and what marks its content."""

    key: str
    size: int
    stamp: str = ""


def hidden(key: str) -> bool:
    """Whether a path inside is none that a person put there: .git, ._x.jpg, __MACOSX."""
    return any(part.startswith((".", "__MACOSX")) for part in key.split("/"))


def named_bytes(text: str) -> bytes:
    """Text with file names in it, to be hashed: names need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


class Folder:
    """The bytes below a folder. `empty`: folders without anything in them, once listed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.empty: list[str] = []

    def entries(self) -> Iterator[Entry]:
        """Every file below the root, symbolic links followed, each real folder entered once."""
        seen = set()
        pending = [self.root]
        self.empty = []
        while pending:
            folder = pending.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as listing:
                items = [item for item in listing if not hidden(item.name)]
            if not items and folder != self.root:
                self.empty.append(folder.relative_to(self.root).as_posix())
            for item in items:
                key = Path(item.path).relative_to(self.root).as_posix()
                if item.is_dir():
                    pending.append(Path(item.path))
                elif item.is_file():
                    yield Entry(key, item.stat().st_size)
                elif item.is_symlink():  # to nothing: reading it says so
                    yield Entry(key, 0)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def where(self, key: str) -> str:
        return str(self.root / key)

    def class_path(self, key: str) -> str:
        return key


class Zip:
    """The bytes inside a zip archive. Reading from several threads is safe; pickling reopens."""

    def __init__(self, path: Path) -> None:
        self.root = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{path} is not a whole zip archive ({error}): copy it again"
            ) from error
        # Of members of equal path the last counts, as unpacking would have it.
        members = [info for info in self._archive.infolist() if not info.is_dir()]
        self._members = {_inside(info.filename): info for info in members}

    def entries(self) -> Iterator[Entry]:
        for key, info in self._members.items():
            if not hidden(key):
                yield Entry(key, info.file_size, f"{info.CRC:08x}")

    def read(self, key: str) -> bytes:
        try:
            return self._archive.read(self._members[key])
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
            # RuntimeError: encrypted, or packed in a way that is not implemented.
            raise Unreadable(f"damaged inside the archive ({str(error)[:120]!r})") from error

    def where(self, key: str) -> str:
        return f"{self.root}!{key}"

    def class_path(self, key: str) -> str:
        return key

    def __getstate__(self) -> Path:
        return self.root

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]


def _inside(name: str) -> str:
    """A member's path with slashes; some tools write backslashes, or ./ in front."""
    return (name if "/" in name else name.replace("\\", "/")).removeprefix("./")


class Files(Protocol):
    """Named bytes: a folder, or what is inside archives.

    The folders of `class_path(key)` name the class of an image.
    """

    root: Path

    def entries(self) -> Iterator[Entry]: ...

    def read(self, key: str) -> bytes: ...

    def where(self, key: str) -> str: ...

    def class_path(self, key: str) -> str: ...
