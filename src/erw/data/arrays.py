"""Images in NumPy arrays, one file of them."""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
from blake3 import blake3

from erw.data.labels import classes
from erw.data.shards import hash_file
from erw.errors import DataError, one_line

_ARRAYS = ("images", "image", "x", "data", "arr_0")


class Arrays:
    """NumPy images, uint8 (N, H, W, 3) or (N, H, W), memory-mapped from .npy, or from an .npz.

    Labels come from the .npz ("labels" or "label") or from NAME_labels.npy beside NAME.npy.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self.path, self.name = path, path.name
        labels: np.ndarray | None = None
        try:
            if path.suffix.lower() == ".npz":
                with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                    name = next((n for n in _ARRAYS if n in held.files), None)
                    if name is None:
                        raise DataError(f"{path} has no images: found {', '.join(held.files)}")
                    self._images = held[name]
                    found = next((n for n in ("labels", "label", "y") if n in held.files), None)
                    labels = held[found] if found else None
            else:
                self._images = np.load(path, mmap_mode="r", allow_pickle=False)
                beside = path.with_name(f"{path.stem}_labels.npy")
                labels = np.load(beside, allow_pickle=False) if beside.exists() else None
        except DataError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} cannot be read as NumPy arrays ({one_line(error)})") from error
        shape = self._images.shape
        grey = self._images.ndim == 3
        if self._images.dtype != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)):
            raise DataError(
                f"{path} holds {self._images.dtype} {shape}: expected uint8 (N, H, W, 3) or "
                "(N, H, W)"
            )
        told = _flat_labels(labels if labelled else None, len(self._images), path)
        self.class_names, self._labels = classes(told, where=str(path))
        digest = blake3(json.dumps([self.class_names, self._labels]).encode())
        digest.update(hash_file(path).encode())
        self._fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.asarray(self._images[index])
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        return image, self._labels[index]

    def where(self, index: int) -> str:
        """The file and number of image `index`."""
        return f"{self.path}[{index}]"

    def fingerprint(self) -> str:
        """Of the file's content and the labels."""
        return self._fingerprint


def _flat_labels(labels: np.ndarray | None, count: int, path: Path) -> list[int | str | None]:
    if labels is None:
        return [None] * count
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"labels of {path} are {labels.dtype} {labels.shape}: expected {count} whole numbers "
            "or names"
        )
    return labels.tolist()
