"""Images in NumPy arrays, one file of them."""

from pathlib import Path

import numpy as np

from erw.data.sources.base import Source, digest
from erw.data.sources.labels import classes, label_name
from erw.errors import DataError, one_line
from erw.io import hash_file

_IMAGES = ("images", "image", "x", "data", "arr_0")


class Arrays(Source):
    """NumPy images, uint8 (N, H, W, 3) or (N, H, W), memory-mapped from .npy, or from an .npz.

    Labels come from the .npz ("labels" and the like, or "arr_1" as ADM writes them) or from
    NAME_labels.npy beside NAME.npy.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self.path, self.name = path, path.name
        labels = None
        notes: list[str] = []
        try:
            if path.suffix.lower() == ".npz":
                with path.open("rb") as file, np.load(file) as arrays:
                    image = next(name for name in _IMAGES if name in arrays.files)
                    self._images = arrays[image]
                    label = label_name([n for n in arrays.files if n != image], notes)
                    label = label or ("arr_1" if "arr_1" in arrays.files else None)
                    labels = arrays[label] if label else None
            else:
                self._images = np.load(path, mmap_mode="r")
                if (other := path.with_name(f"{path.stem}_labels.npy")).exists():
                    labels = np.load(other)
        except StopIteration:
            raise DataError(f"{path} has no array called {', '.join(_IMAGES)}") from None
        except Exception as error:  # of zip, zlib or NumPy
            raise DataError(f"{path} cannot be read as NumPy arrays ({one_line(error)})") from error
        shape, kind = self._images.shape, self._images.dtype
        grey = len(shape) == 3 and shape[2] not in (1, 3, 4)  # else one image: an axis is missing
        if kind != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)):
            raise DataError(
                f"{path} holds {kind} {shape}: expected uint8 (N, H, W, 3), also of one image, "
                "or (N, H, W)"
            )
        labels = labels if labelled else None
        if labels is not None and labels.shape != shape[:1]:
            raise DataError(f"labels of {path} are {labels.shape}: expected ({shape[0]},)")
        values = [None] * shape[0] if labels is None else labels.tolist()
        self.notes = tuple(notes)
        self.class_names, numbers = classes(values, source=str(path))
        self.labels = np.asarray(numbers, dtype=np.int32)
        self._fingerprint = digest([self.class_names, numbers], [hash_file(path)])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.ascontiguousarray(self._images[index])
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        return image, int(self.labels[index])
