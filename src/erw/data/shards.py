"""One file of a shard: safetensors, written in one piece and read by rows.

Written here rather than by the safetensors package so that equal rows give equal bytes (its
metadata has no fixed order), the hash is taken on the way, and nothing is copied.
"""

import fcntl
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from blake3 import blake3

from erw.errors import CacheError
from erw.io import write_file

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

Kind = tuple[str, tuple[int, ...]]
"""Type of a column, a key of `DTYPES`, and shape of one row."""

SINGLE = ("label", "item", "image")
"""Columns that a row has once, however many variants of it there are."""


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

    write_file(path, put)
    return Written(path.name, size, digest.hexdigest())


class ShardReader:
    """The columns in one file of a shard, memory-mapped.

    A column has a row for each variant of each row of the shard, or for each row if it is one of
    `SINGLE`. With `hold`, whoever would remove the file finds it locked as long as this lives.
    """

    def __init__(self, path: Path, *, rows: int, variants: int = 1, hold: bool = False) -> None:
        self.path = path
        try:
            self._columns = _columns(path, rows=rows, variants=variants, hold=hold)
        except FileNotFoundError:
            raise CacheError(f"shard {path} is missing: run the same erw prepare again") from None
        except OSError as error:
            raise CacheError(f"shard {path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"shard {path} is damaged ({error}): erw prepare --repair") from error

    def values(self, name: str, kind: Kind | None = None) -> np.ndarray:
        """A column, rows first, in the pages of its file.

        Raises `CacheError` if there is none, if it is of another kind than told, or if its file was
        cut short since it was opened: to touch a page that is gone would end the process.
        """
        mapped = self._mapped(name)
        if kind is not None and mapped.kind != kind:
            raise CacheError(
                f"shard {self.path} holds {mapped.kind[0]} {mapped.kind[1]} as {name}, not "
                f"{kind[0]} {kind[1]} as the manifest says: erw prepare --repair"
            )
        if mapped.pages.size() != len(mapped.pages):
            raise CacheError(
                f"shard {self.path} has changed its size since it was opened: erw prepare --repair"
            )
        return mapped.values

    def will_read(self, name: str, rows: Sequence[int]) -> None:
        """Have the system fetch these rows of a column, all at once, while others are copied.

        Without it a disk would be asked for a few pages at a time, when they are missed. Rows that
        were asked for before are taken to be in memory: asking again takes a tenth of reading them.
        """
        mapped = self._mapped(name)
        width, asked = mapped.width, mapped.asked
        if width < mmap.PAGESIZE or not hasattr(mmap, "MADV_WILLNEED"):
            return  # whole rows come around the page that is missed
        for row in rows:
            if asked[row]:
                continue
            asked[row] = 1
            first = mapped.start + row * width
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.pages.madvise(mmap.MADV_WILLNEED, page, first + width - page)

    def _mapped(self, name: str) -> "_Mapped":
        try:
            return self._columns[name]
        except KeyError:
            raise CacheError(
                f"shard {self.path} has no column {name}: erw prepare --repair"
            ) from None


class _Mapped(NamedTuple):
    """A column in the pages of its whole file: its first byte there, bytes of a row.

    `asked` has a byte for each row, 1 once the system was asked to fetch it.
    """

    pages: mmap.mmap
    start: int
    width: int
    kind: "Kind"
    values: np.ndarray
    asked: bytearray


def _columns(path: Path, *, rows: int, variants: int, hold: bool) -> dict[str, _Mapped]:
    """The columns that a safetensors header lists; ValueError if it cannot be right."""
    file = os.open(path, os.O_RDONLY)
    try:
        if hold:  # the map keeps the lock when the file is closed
            fcntl.flock(file, fcntl.LOCK_SH)
        pages = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(file)
    length = int.from_bytes(pages[:8], "little")
    if 8 + length > len(pages):
        raise ValueError("header longer than the file")
    columns, spans = {}, []
    for name, entry in json.loads(pages[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        dtype = _NAMES[entry["dtype"]]
        kind = np.dtype(DTYPES[dtype][1])
        begins = [rows] if variants == 1 or name in SINGLE else [rows, variants]
        shape = entry["shape"][len(begins) :]
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        number, width = math.prod(begins), math.prod(shape) * kind.itemsize
        if entry["shape"] != begins + shape or stop - start != number * width or stop > len(pages):
            raise ValueError(
                f"column {name} has shape {entry['shape']} in {stop - start} bytes, where {begins} "
                f"are expected first and {number * width} bytes"
            )
        values = np.frombuffer(pages, kind, number * math.prod(shape), start)
        columns[name] = _Mapped(
            pages,
            start,
            width,
            (dtype, tuple(shape)),
            values.reshape(number, *shape),
            bytearray(number),
        )
        spans.append((start, stop))
    at = 8 + length
    for start, stop in sorted(spans):
        if start != at:
            raise ValueError(f"a column begins at byte {start}, not {at}")
        at = stop
    if at != len(pages):
        raise ValueError(f"its columns end at byte {at} of {len(pages)}")
    return columns


def hash_file(path: Path) -> str:
    """blake3 of a file, through a memory map."""
    digest = blake3()
    digest.update_mmap(path)
    return digest.hexdigest()
