"""Images in NumPy arrays, one file of them."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from erw.data.sources.base import LabelledImages, digest
from erw.data.sources.labels import classes, label_name
from erw.errors import DataError, one_line
from erw.io import hash_file

_IMAGES = ("images", "image", "x", "data", "arr_0")


class Arrays(LabelledImages):
    """NumPy images, uint8 (N, H, W, 3) or (N, H, W), memory-mapped from .npy, or from an .npz.

    Labels come from the .npz ("labels" and the like, or "arr_1" as ADM writes them) or from
    NAME_labels.npy beside NAME.npy.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self.path, self.name = path, path.name
        labels: np.ndarray | None = None
        notes: list[str] = []
        try:
            if path.suffix.lower() == ".npz":
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    image = next((name for name in _IMAGES if name in arrays.files), None)
                    if image is None:
                        raise DataError(f"{path} has no images: found {', '.join(arrays.files)}")
                    self._images = arrays[image]
                    label = label_name([n for n in arrays.files if n != image], notes)
                    label = label or ("arr_1" if "arr_1" in arrays.files else None)
                    labels = arrays[label] if label else None
            else:
                self._images = np.load(path, mmap_mode="r", allow_pickle=False)
                if (other := path.with_name(f"{path.stem}_labels.npy")).exists():
                    labels = np.load(other, allow_pickle=False)
        except DataError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} cannot be read as NumPy arrays ({one_line(error)})") from error
        shape, kind = self._images.shape, self._images.dtype
        if kind != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            raise DataError(
                f"{path} holds {kind} {shape}: expected uint8 (N, H, W, 3) or (N, H, W)"
            )
        if len(shape) == 3 and shape[2] in (1, 3, 4):
            raise DataError(f"{path} holds one image {shape}: expected (N, H, W, 3); add an axis")
        count = len(self._images)
        if labelled and labels is not None and labels.shape != (count,):
            raise DataError(
                f"labels of {path} are {labels.dtype} {labels.shape}: expected {count} whole "
                "numbers or names"
            )
        values = labels.tolist() if labelled and labels is not None else [None] * count
        self.notes = tuple(notes)
        self.class_names, numbers = classes(values, source=str(path))
        self.labels = np.asarray(numbers, dtype=np.int32)
        self._fingerprint = digest([self.class_names, numbers], [hash_file(path)])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.ascontiguousarray(self._images[index])
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        return image, int(self.labels[index])

    def location(self, index: int) -> str:
        """The file and number of image `index`."""
        return f"{self.path}[{index}]"
