"""Who makes which span: byte-range locks on one file, dropped when their process dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from erw.errors import CacheError


class Claims:
    """Locks on shards of a folder, shared by all processes that fill it, on any machine.

    On systems without POSIX locks every claim succeeds: files are then written twice at worst,
    each time whole and with equal bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            raise CacheError(
                f"{folder} was removed by another process, which found no image to be of use: see "
                "rejected.jsonl beside it"
            ) from None

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)  # drops every lock of this process

    def take(self, index: int, added: int | None = None) -> bool:
        """Lock a shard, or its features of the encoder `added` later; False if another has it."""
        try:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(index, added))
        except ImportError:
            return True
        except BlockingIOError:
            return False
        return True

    def drop(self, index: int, added: int | None = None) -> None:
        """Give it back."""
        try:
            import fcntl

            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(index, added))
        except ImportError:
            pass


@contextmanager
def settling(out: Path) -> Iterator[None]:
    """No other process reads, checks and writes the settings of the cache in `out` meanwhile."""
    try:
        import fcntl

        file = os.open(out / "shards" / ".settings", os.O_RDWR | os.O_CREAT, 0o644)
    except (ImportError, OSError):  # no cache yet, or one that cannot be written: nothing to settle
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _place(index: int, added: int | None) -> int:
    """The byte that stands for them: shards first, then those of each added encoder."""
    return index if added is None else index + ((added + 1) << 40)
