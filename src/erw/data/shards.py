"""One shard of a cache: safetensors files, hashed by blake3, their columns mapped into memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erw.data.spec import Column
from erw.errors import CacheError, CheckpointError, one_line
from erw.io import hash_file, save_tensors


class File(NamedTuple):
    """What a manifest records of a file."""

    file: str
    bytes: int
    blake3: str


@dataclass(frozen=True)
class Shard:
    """Images `first` to `first + items` of the source, less those rejected, in `files`."""

    index: int
    first: int
    items: int
    rows: int
    files: tuple[File, ...]


def shard_file(index: int, part: str = "") -> str:
    """The name of one of a shard's files: latents (""), "images", or an encoder's number."""
    return f"{index:05d}{part and f'.{part}'}.safetensors"


def write_columns(path: Path, columns: Mapping[str, Tensor]) -> File:
    """Write columns (rows first), whole or not at all. Equal columns give equal bytes.

    Raises:
        CacheError: the disk is full.
    """
    try:
        save_tensors(path, columns)
    except CheckpointError as error:
        raise CacheError(str(error)) from error
    return File(path.name, path.stat().st_size, hash_file(path))


class ShardReader:
    """The columns of a shard by name; a file is mapped when one of its columns is first used.

    Args:
        parts: the columns of its files (see `CacheSpec.columns`).
        local: the path of a file on this machine.
    """

    def __init__(
        self,
        shard: Shard,
        parts: Mapping[str, Mapping[str, Column]],
        local: Callable[[File], Path],
    ) -> None:
        self.rows, self._parts, self._local, self._shard = shard.rows, parts, local, shard
        self._files = {file.file: file for file in shard.files}
        self._mapped: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A column, rows first; its pages are read when they are touched.

        Raises:
            CacheError: its file is missing, damaged, or holds other columns than it should.
        """
        if name not in self._mapped:
            part = next(part for part, columns in self._parts.items() if name in columns)
            path = shard_file(self._shard.index, part)
            if path not in self._files:
                raise CacheError(f"the manifest lists no file {path}: run erw prepare again")
            local = self._local(self._files[path])
            self._mapped |= map_columns(local, self._parts[part], rows=self.rows)
        return self._mapped[name]


def map_columns(path: Path, columns: Mapping[str, Column], *, rows: int) -> dict[str, Tensor]:
    """The mapped columns of a file. Raises as `ShardReader` does."""
    from safetensors import SafetensorError, safe_open

    again = "run the same erw prepare again"
    try:
        with safe_open(path, "pt") as file:  # checks the header against the size of the file
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CacheError(f"shard {path} is missing: {again}") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CacheError(f"shard {path} is damaged ({one_line(error)}): {again}") from error
    for name, (dtype, shape) in columns.items():
        column = mapped.get(name, torch.empty(0))
        kind, expected = str(column.dtype).removeprefix("torch."), (rows, *shape)
        if name not in mapped or kind != dtype or column.shape != expected:
            raise CacheError(
                f"shard {path} has {kind} {tuple(column.shape)} as {name}, not {dtype} {expected} "
                f"as the manifest says: {again}"
            )
    return mapped
