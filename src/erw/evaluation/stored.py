"""Statistics of features, and where they are kept: whole ones of references, chunks on their way.

    FOLDER/CONTENT-COUNT-ENCODER.safetensors                  moments, and the features if kept
    FOLDER/chunks/CONTENT-COUNT-SIZE/ENCODER/00012.safetensors   features of images 12 SIZE and on

FOLDER is the user's cache folder unless told otherwise. Chunks are what an evaluation that was
killed goes on from; they go away with its end. All of it may be deleted at any time.
"""

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import DataError
from erw.evaluation.distances import Moments


@dataclass(frozen=True)
class Statistics:
    """Features of a set of images: their moments, all of them if they were kept, their resolution.

    `resolution` is (height, width) of the images, None when it is not known.
    """

    moments: Moments
    features: Tensor | None = None
    resolution: tuple[int, int] | None = None


class Chunk(NamedTuple):
    """Features (N, D) of some images in a row, and (height, width) of these."""

    features: Tensor
    resolution: tuple[int, int]


@dataclass(frozen=True)
class Chunks:
    """Features of one set of images by chunk, on disk; `key` names an encoder and its weights."""

    folder: Path

    def read(self, key: str, number: int) -> Chunk | None:
        """A chunk that is there and whole."""
        try:
            found = _read(self._path(key, number))
            height, width = found["resolution"].tolist()
            return Chunk(found["features"], (height, width))
        except (OSError, KeyError, ValueError, DataError):
            return None

    def write(self, key: str, number: int, chunk: Chunk) -> None:
        """Keep a chunk. Where that is impossible, warn: the evaluation itself need not stop."""
        tensors = {"features": chunk.features, "resolution": torch.tensor(chunk.resolution)}
        try:
            _write(self._path(key, number), tensors)
        except OSError as error:
            warnings.warn(
                f"features cannot be kept in {self.folder} ({error.strerror}): if this is "
                "interrupted it begins anew; name another folder with $XDG_CACHE_HOME",
                stacklevel=2,
            )

    def drop(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, key: str, number: int) -> Path:
        return self.folder / key / f"{number:05d}.safetensors"


def cache_folder() -> Path:
    """The user's cache folder of erw: $XDG_CACHE_HOME/erw, or ~/.cache/erw."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "erw"


def save_statistics(path: str | Path, found: Statistics) -> None:
    """Write statistics as safetensors, to be given as a reference later."""
    moments = found.moments
    tensors = {
        "count": torch.tensor(moments.count),
        "mean": moments.mean,
        "scatter": moments.scatter,
    }
    if found.features is not None:
        tensors["features"] = found.features
    if found.resolution is not None:
        tensors["resolution"] = torch.tensor(found.resolution)
    _write(Path(path), tensors)


def load_statistics(path: str | Path) -> Statistics:
    """What `save_statistics` wrote. Raises FileNotFoundError, or DataError for another file."""
    tensors = _read(Path(path))
    try:
        moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])
    except KeyError as error:
        raise DataError(f"{path} holds no statistics of ours (no {error}): make it again") from None
    resolution = tensors.get("resolution")
    sides = None if resolution is None else (int(resolution[0]), int(resolution[1]))
    return Statistics(moments, tensors.get("features"), sides)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path} holds no statistics of ours ({error}): make it again") from error


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Beside the name, then rename: a file that is there is whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
