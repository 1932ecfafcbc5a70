"""One shard: a safetensors file, written in one piece and read through a memory map.

Written here rather than by the safetensors package so that equal rows give equal bytes (its
metadata has no fixed order), the hash is taken on the way, and nothing is copied.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from blake3 import blake3

from ..errors import CacheError

# dtype name: (name in safetensors, NumPy type that carries the bits)
DTYPES = {
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int8": ("I8", "|i1"),
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


def write_beside(path: Path, put: Callable[[IO[bytes]], None]) -> None:
    """Call `put` on a temporary file, sync it to disk, rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write text beside and rename."""

    def put(file: IO[bytes]) -> None:
        file.write(text.encode())

    write_beside(path, put)


def map_shard(path: Path) -> dict[str, Column]:
    """The columns of a safetensors file as read-only memory maps; nothing is read yet."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        raw = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        columns = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = _NAMES[entry["dtype"]]
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            values = raw[start:stop].view(DTYPES[dtype][1]).reshape(entry["shape"])
            columns[name] = Column(dtype, values)
        return columns
    except FileNotFoundError as error:
        raise CacheError(f"shard {path} is missing: run the same erw prepare again") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CacheError(f"shard {path} is damaged ({error}): erw prepare --repair") from error


def hash_file(path: Path) -> str:
    """blake3 of a file, through a memory map."""
    digest = blake3()
    digest.update_mmap(path)
    return digest.hexdigest()
