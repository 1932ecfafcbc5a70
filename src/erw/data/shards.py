"""One shard: a safetensors file, written in one piece and read by rows.

Written here rather than by the safetensors package so that equal rows give equal bytes (its
metadata has no fixed order), the hash is taken on the way, and nothing is copied.
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from blake3 import blake3

from ..errors import CacheError
from ..files import write_beside

# dtype name: (name in safetensors, NumPy type that carries the bits)
DTYPES = {
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int8": ("I8", "|i1"),
    "float8_e4m3fn": ("F8_E4M3", "|u1"),
    "uint8": ("U8", "|u1"),
}
_NAMES = {code: name for name, (code, _) in DTYPES.items()}


class Column(NamedTuple):
    """One tensor of a shard, rows first. `dtype` is a key of `DTYPES`."""

    dtype: str
    values: np.ndarray


class Written(NamedTuple):
    """What a manifest keeps of a file."""

    file: str
    bytes: int
    blake3: str


def write_shard(path: Path, columns: Mapping[str, Column]) -> Written:
    """Write columns to a safetensors file: beside, synced, then renamed."""
    header: dict[str, object] = {}
    parts: list[Any] = []
    offset = 0
    # Widest numbers first, so that every column starts at a multiple of its item size.
    widest_first = sorted(columns, key=lambda name: (-columns[name].values.itemsize, name))
    for name in widest_first:
        dtype, values = columns[name]
        code, kind = DTYPES[dtype]
        assert values.dtype == np.dtype(kind), (name, dtype, values.dtype)
        parts.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        span = [offset, offset + values.nbytes]
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": span}
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    digest = blake3()
    size = 0

    def put(file: IO[bytes]) -> None:
        nonlocal size
        for part in (len(text).to_bytes(8, "little"), text, *parts):
            file.write(part)
            digest.update(part)
            size += len(part)

    write_beside(path, put)
    return Written(path.name, size, digest.hexdigest())


class Span(NamedTuple):
    """Where a column lies in a file. `shape` is that of one row."""

    file: int
    start: int
    row_bytes: int
    dtype: str
    shape: tuple[int, ...]


class ShardReader:
    """Rows of one shard, whichever of its files their columns lie in.

    Rows are read, not mapped: memory stays flat however much of a cache is visited, a row comes
    in one request from a cold disk, and a file that shrinks is an error rather than a crash.
    """

    def __init__(self, paths: Sequence[Path], *, rows: int) -> None:
        self._paths = tuple(paths)
        self._files: list[int] = []
        self.columns: dict[str, Span] = {}
        for number, path in enumerate(self._paths):
            try:
                self._files.append(os.open(path, os.O_RDONLY))
                self.columns |= _columns(self._files[-1], number, rows=rows)
            except FileNotFoundError:
                raise CacheError(
                    f"shard {path} is missing: run the same erw prepare again"
                ) from None
            except OSError as error:
                raise CacheError(f"shard {path} cannot be read ({error.strerror})") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CacheError(
                    f"shard {path} is damaged ({error}): erw prepare --repair"
                ) from error

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)

    def hold(self) -> None:
        """Lock the files, together with other readers, against whoever would remove them."""
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_SH)

    def span(self, name: str) -> Span:
        """Where a column lies. Raises `CacheError` if there is none of that name."""
        try:
            return self.columns[name]
        except KeyError:
            raise CacheError(
                f"shard {self._paths[0]} has no column {name}: erw prepare --repair"
            ) from None

    def where(self, name: str, *, like: Span) -> tuple[int, int]:
        """A column's file, open as long as this reader is, and its first byte there.

        Raises `CacheError` unless its rows have the type and shape of `like`.
        """
        span = self.span(name)
        if (span.dtype, span.shape) != (like.dtype, like.shape):
            raise CacheError(
                f"shard {self._paths[span.file]} holds {span.dtype} {span.shape} as {name}, others "
                f"{like.dtype} {like.shape}: erw prepare --repair"
            )
        return self._files[span.file], span.start

    def read(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` with a column's bytes from byte `start` on."""
        span, got = self.span(name), 0
        file, first = self._files[span.file], span.start
        while got < len(into):  # a single request is capped at 2 GiB
            more = os.preadv(file, [into[got:]], first + start + got)
            if not more:
                raise CacheError(
                    f"shard {self._paths[span.file]} is cut short: erw prepare --repair"
                )
            got += more


def _columns(file: int, number: int, *, rows: int) -> dict[str, Span]:
    """The columns that a safetensors header lists; ValueError if it cannot be right."""
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if 8 + length > size:
        raise ValueError("header longer than the file")
    header = json.loads(os.pread(file, length, 8))
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # read what is asked for, no more
    columns = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _NAMES[entry["dtype"]]
        found, *shape = entry["shape"]
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        row_bytes = math.prod(shape) * np.dtype(DTYPES[dtype][1]).itemsize
        if found != rows or stop - start != rows * row_bytes or stop > size:
            raise ValueError(f"column {name} has {found} rows of {row_bytes} bytes, not {rows}")
        columns[name] = Span(number, start, row_bytes, dtype, tuple(shape))
    at = 8 + length
    for span in sorted(columns.values(), key=lambda span: span.start):
        if span.start != at:
            raise ValueError(f"a column begins at byte {span.start}, not {at}")
        at += rows * span.row_bytes
    if at != size:
        raise ValueError(f"its columns end at byte {at} of {size}")
    return columns


def hash_file(path: Path) -> str:
    """blake3 of a file, through a memory map."""
    digest = blake3()
    digest.update_mmap(path)
    return digest.hexdigest()
