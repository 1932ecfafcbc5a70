"""Files that are either as they were or whole: written beside their name, synced, renamed."""

import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import IO


def write_beside(path: Path, put: Callable[[IO[bytes]], None]) -> None:
    """Call `put` on a hidden file beside `path`, sync it to the disk and rename it.

    Raises OSError, which names `path`; what was written is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_unfinished(folder: Path, names: Container[str]) -> None:
    """Remove what killed writers left of files of these names, which nobody may be writing now."""
    for part in folder.glob(".*.part"):
        if part.name[1:].rsplit(".", 2)[0] in names:
            part.unlink(missing_ok=True)


def write_bytes(content: bytes, path: Path) -> None:
    """Write bytes beside and rename."""

    def put(file: IO[bytes]) -> None:
        file.write(content)

    write_beside(path, put)


def write_text(path: Path, text: str) -> None:
    """Write text, in UTF-8, beside and rename."""
    write_bytes(text.encode(), path)
