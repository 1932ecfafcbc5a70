"""Shards of far caches on this machine's disk: a bounded folder that all its processes share.

A shard is named by its blake3, so that it is kept once however many caches and addresses it came
by, and nothing in the folder can be out of date. The least recently used ones make room for new.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from erw.data.shards import Written, hash_file
from erw.errors import CacheError, ConfigError

FOLDER, SIZE = "ERW_SHARD_CACHE", "ERW_SHARD_CACHE_GB"
DEFAULT_GB = 100.0
TRIES = 3


class NoRoom(CacheError):
    """Other shards are being read, and leave no room for one more."""


class CameDamaged(CacheError):
    """A shard is not what the manifest says, however often it is fetched."""


class Store:
    """Whole shards in `folder`, at most `limit` bytes of them, downloads under way included."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):  # of downloads that were killed
            with _locked(part) as alone:
                if alone:
                    part.unlink(missing_ok=True)

    @classmethod
    def of_this_machine(cls) -> "Store":
        """The folder and size that the environment names, or ~/.cache/erw/shards and 100 GB.

        Where the disk has less than that to give, nine tenths of it. Raises `ConfigError`.
        """
        home = os.environ.get("XDG_CACHE_HOME")
        default = (Path(home) if home else Path.home() / ".cache") / "erw" / "shards"
        store = cls(Path(os.environ.get(FOLDER) or default).expanduser(), limit=0)
        if told := os.environ.get(SIZE):
            try:
                store.limit = int(float(told) * 1e9)
            except (ValueError, OverflowError):
                raise ConfigError(f"{SIZE} is {told!r}: expected a number of gigabytes") from None
        else:
            disk = os.statvfs(store.folder)
            free = disk.f_bavail * disk.f_frsize + sum(size for _, size, _ in store._held())
            store.limit = int(min(DEFAULT_GB * 1e9, 0.9 * free))
        return store

    def has(self, file: Written) -> bool:
        """Whether a shard's file is here."""
        try:
            return self._path(file).stat().st_size == file.bytes
        except FileNotFoundError:
            return False

    def drop(self, file: Written) -> None:
        """Forget a shard's file; who reads it now goes on doing so."""
        self._path(file).unlink(missing_ok=True)

    def fetch(self, file: Written, download: Callable[[Path], None], *, source: str) -> Path:
        """The path of a shard's file, made by `download(path)` if it is not here.

        Any number of threads and processes may ask at once: one downloads, the others wait. Its
        blake3 is checked before it gets its name, so what has a name is whole.

        Raises `NoRoom`; `CameDamaged` after three attempts; `CacheError` if the disk is full; and
        whatever `download` raises.
        """
        path = self._path(file)
        while not self._used_now(path, file):
            with self._claimed(file) as part:
                if not self.has(file):
                    with self._counting():
                        self._room(file)
                    self._download(file, part, download, source)
                    with self._counting():
                        os.replace(part, path)
        return path

    def _download(
        self, file: Written, part: Path, download: Callable[[Path], None], source: str
    ) -> None:
        for _ in range(TRIES):
            try:
                download(part)
                if part.stat().st_size == file.bytes and hash_file(part) == file.blake3:
                    with open(part, "rb+") as written:
                        os.fsync(written.fileno())
                    return
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise CacheError(
                        f"no space left for shards in {self.folder}: free some, or name a folder "
                        f"on another disk in {FOLDER}"
                    ) from error
                raise
        raise CameDamaged(
            f"shard {file.file} came damaged from {source} {TRIES} times: verify the original with "
            "erw prepare --verify and upload it again"
        )

    def _path(self, file: Written) -> Path:
        return self.folder / f"{file.blake3}.safetensors"

    def _used_now(self, path: Path, file: Written) -> bool:
        """Mark a shard as used just now; False if it is not here."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return self.has(file)

    @contextmanager
    def _claimed(self, file: Written) -> Iterator[Path]:
        """A file to download to, which no other thread or process writes; gone afterwards.

        Its lock goes with its process. Its name tells how much room it will take.
        """
        part = self.folder / f".{file.blake3}-{file.bytes}.part"
        while True:
            with _locked(part, create=True, wait=True) as mine:
                if not mine:  # renamed or removed while we waited
                    continue
                try:
                    yield part
                finally:
                    part.unlink(missing_ok=True)
                return

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Nobody else counts or renames: what changes its name meanwhile might not be counted."""
        with _locked(self.folder / ".lock", create=True, wait=True):
            yield

    def _held(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of all shards, and of downloads at the size that they will be."""
        found = []
        for entry in os.scandir(self.folder):
            try:
                told = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith(".part"):
                size = int(entry.name.removesuffix(".part").rpartition("-")[2])
                found.append((float("inf"), size, Path(entry.path)))
            elif entry.name.endswith(".safetensors"):
                found.append((told.st_mtime, told.st_size, Path(entry.path)))
        return sorted(found)

    def _room(self, file: Written) -> None:
        """Remove shards, those used longest ago first, until all fits; never one being read."""
        held = self._held()
        over = sum(size for _, size, _ in held) - self.limit
        for used, size, path in held:
            if over <= 0:
                return
            if used == float("inf"):
                continue
            with _locked(path) as alone:
                if alone:
                    path.unlink(missing_ok=True)
                    over -= size
        if over > 0:
            raise NoRoom(
                f"{self.folder} may hold {self.limit / 1e9:.3g} GB, and shards being read leave no "
                f"room for {file.file} ({file.bytes / 1e9:.3g} GB): set {SIZE} to more"
            )


@contextmanager
def _locked(path: Path, *, create: bool = False, wait: bool = False) -> Iterator[bool]:
    """Whether the file at `path` is now locked by us alone; until the end of the block."""
    try:
        file = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    except FileNotFoundError:
        yield False
        return
    _locks.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        there = os.stat(path).st_ino == os.fstat(file).st_ino
    except (BlockingIOError, FileNotFoundError):
        there = False
    try:
        yield there
    finally:
        if file in _locks:  # not so in a process that was forked meanwhile
            _locks.remove(file)
            os.close(file)


_locks: set[int] = set()


def _let_go() -> None:
    """Close a forked process's copies of locks that threads of its parent hold.

    With them a lock would last as long as the child, which waits for it itself.
    """
    for file in _locks:
        os.close(file)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
