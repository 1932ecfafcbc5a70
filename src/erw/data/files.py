"""Named bytes: what lies below a folder or inside a zip archive."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import DataError
from .images import Unreadable


class Entry(NamedTuple):
    """One file of a collection: its path inside, size in bytes, and what marks its content."""

    key: str
    size: int
    stamp: str = ""


class Folder:
    """The bytes below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self) -> Iterator[Entry]:
        """Every file below the root, symbolic links followed, each real folder entered once."""
        seen = set()
        pending = [self.root]
        while pending:
            folder = pending.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as listing:
                for item in listing:
                    if item.name.startswith("."):
                        continue
                    if item.is_dir():
                        pending.append(Path(item.path))
                    elif item.is_file():
                        key = Path(item.path).relative_to(self.root).as_posix()
                        yield Entry(key, item.stat().st_size)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def where(self, key: str) -> str:
        return str(self.root / key)


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

    def entries(self) -> Iterator[Entry]:
        for info in self._archive.infolist():
            hidden = any(part.startswith((".", "__MACOSX")) for part in info.filename.split("/"))
            if not info.is_dir() and not hidden:
                yield Entry(info.filename, info.file_size, f"{info.CRC:08x}")

    def read(self, key: str) -> bytes:
        try:
            return self._archive.read(key)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            # RuntimeError: encrypted, or packed in a way that is not implemented.
            raise Unreadable(f"damaged inside the archive ({str(error)[:120]!r})") from error

    def where(self, key: str) -> str:
        return f"{self.root}!{key}"

    def __getstate__(self) -> Path:
        return self.root

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]


class Files(Protocol):
    """Named bytes: a folder, or what is inside an archive."""

    root: Path

    def entries(self) -> Iterator[Entry]: ...

    def read(self, key: str) -> bytes: ...

    def where(self, key: str) -> str: ...
