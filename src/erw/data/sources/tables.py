"""Images in tables (Parquet and Arrow as Hugging Face `datasets` writes them) and NumPy arrays."""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from erw.data.images import WHITE, Unreadable
from erw.data.sources.files import Source, digest
from erw.data.sources.labels import USUAL, classes, ending, label_name, listed
from erw.errors import DataError, raised_as
from erw.io import hash_file, opened_npz

_COLUMNS = ("image", "img", "jpg", "png", "webp")
_CELLS = r"(struct<(.*, )?(bytes|path): )?(large_)?(binary|string|null)"
_ARRAYS = ("images", "image", "x", "data", "arr_0")


class Table(Source):
    """Rows of Parquet or Arrow files, in the order of their names.

    An image column holds {"bytes", "path"} as `datasets` stores images, plain bytes, or paths,
    which are relative to the first file; a label column whole numbers or text, with class names
    from the metadata of `datasets` if it is there. `columns` names the two, or the first alone,
    where neither usual names nor that metadata tell.
    """

    def __init__(
        self, paths: Sequence[Path], *, labelled: bool = True, columns: Sequence[str] = ()
    ) -> None:
        first, *others = self.paths = sorted(paths)
        self.name = first.parent.name if others else first.name
        values, expected = list[Any](), None
        self._places: list[tuple[Path, int, int]] = []  # file, row group and row in it
        for path in self.paths:
            schema, sizes, read = _open(path)
            layout = self._image, label, names = _columns(path, schema, columns, labelled)
            expected = expected or layout
            if layout != expected:
                hint = "read one alone, or take --classes none"
                raise DataError(f"{path} has {layout!s:.99}, {first} {expected!s:.99}: {hint}")
            for group, size in enumerate(sizes):
                self._places += [(path, group, row) for row in range(size)]
                with raised_as(DataError, f"{path} is damaged"):
                    values += read(group, label).to_pylist() if label else [None] * size
        if rest := [
            name for name in schema.names if labelled and not label and name != self._image
        ]:
            hint = f"--columns {self._image} NAME takes one as label"
            self.notes = [f"columns {listed(rest)} are not used: {hint}"]
        place = f"{first}, column {label}" if label else str(first)
        self.class_names, self.labels = classes(values, source=place, names=names)
        lines = (f"{path.name} {hash_file(path)}\n" for path in self.paths)
        self._fingerprint = digest([self.class_names, WHITE, *columns], lines)
        # A few blocks are cached, since threads are asked for rows in order.
        self._block = lru_cache(maxsize=4)(lambda path, group: _open(path)[2](group, self._image))

    def read(self, index: int) -> bytes:
        path, group, row = self._places[index]
        with raised_as(Unreadable, "damaged inside the table"):
            value = self._block(path, group)[row].as_py()
            if not isinstance(value, dict):
                value = {"path" if isinstance(value, str) else "bytes": value}
            if value.get("bytes") is None and value.get("path"):
                return (self.paths[0].parent / value["path"]).read_bytes()
        return value.get("bytes") or b""

    def location(self, index: int) -> str:
        return "{}, row group {}, row {}".format(*self._places[index])


def _open(path: Path) -> tuple[Any, list[int], Callable[[int, str], Any]]:
    """Schema, rows of each row group (an Arrow file is one), and (group, column) -> Arrow array."""
    kind = ending(path.name)[1:]
    with raised_as(DataError, f"{path} cannot be read as {kind}"):
        import pyarrow
        from pyarrow import ipc, parquet

        if kind == "parquet":
            file = parquet.ParquetFile(path)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            return file.schema_arrow, sizes, lambda i, n: file.read_row_group(i, [n]).column(0)
        mapped = pyarrow.memory_map(str(path))
        try:
            table = ipc.open_file(mapped).read_all()
        except pyarrow.ArrowInvalid:  # the stream format, which `datasets` writes
            mapped.seek(0)
            table = ipc.open_stream(mapped).read_all()
        return table.schema, [len(table)], lambda _, name: table.column(name)


def _columns(
    path: Path, schema: Any, columns: Sequence[str], labelled: bool
) -> tuple[Any, Any, list[str]]:
    """The image and the label column, as given, by usual names, by features; the class names."""
    names, pictures = schema.names, list(_features(schema, "Image"))
    usual = [name for name in _COLUMNS if name in names] or pictures[: len(pictures) == 1]
    image = (*columns[:1], *usual, None)[0]
    if missing := [name or "image" for name in (image, *columns) if name not in names]:
        hint = f"found {', '.join(names)}; name the image and the label column with --columns"
        raise DataError(f"{path} has no column {missing[0]}: {hint}")
    kind = schema.field(image).type
    if not re.match(_CELLS, str(kind)):
        problem = f"image column {image} has type {kind}, expected bytes or a path"
        raise DataError(f"{path}: {problem}; name another with --columns")
    if not labelled:
        return image, None, []
    marked = _features(schema, "ClassLabel")
    rest = [name for name in names if name != image]
    label = columns[1] if len(columns) > 1 else label_name(rest, list(marked))
    return image, label, marked.get(label or "", [])


def _features(schema: Any, kind: str) -> dict[str, list[str]]:
    """Columns of a kind, with their class names, by the metadata of `datasets`."""
    meta = json.loads((schema.metadata or {}).get(b"huggingface", "{}"))
    features = (meta.get("info", {}).get("features") or {}).items()
    some = {name: f for name, f in features if isinstance(f, dict) and f.get("_type") == kind}
    return {name: list(map(str, feature.get("names") or ())) for name, feature in some.items()}


class Arrays(Source):
    """NumPy images, uint8 (N, H, W, 3) or (N, H, W), memory-mapped from .npy, or from an .npz.

    Labels come from the .npz ("labels" and the like, or "arr_1" as ADM writes them) or from
    NAME_labels.npy beside NAME.npy.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self.name = path.name
        labels = None
        if ending(path.name) == ".npz":
            with opened_npz(path) as arrays:
                image = next((name for name in _ARRAYS if name in arrays), "images")
                self._images, rest = arrays[image], [name for name in arrays if name != image]
                label = label_name(rest)
                labels = arrays[label] if label else None
            if rest and labelled and not label:
                hint = f'name one of them "{USUAL[1]}" to take it as label'
                self.notes = [f"arrays {listed(rest)} are not used: {hint}"]
        else:
            self._images = _mapped(path)
            if (other := path.with_name(f"{path.stem}_labels.npy")).exists():
                labels = _mapped(other)
            elif rest := [x.name for x in path.parent.glob("*label*.npy") if x != path]:
                self.notes = [f"{listed(sorted(rest))} is not used: labels are in {other.name}"]
        shape, kind = self._images.shape, self._images.dtype
        grey = len(shape) == 3 and shape[2] not in (1, 3, 4)  # else one image: an axis is missing
        if kind != np.uint8 or not (grey or (len(shape) == 4 and shape[3] == 3)):
            expected = "expected uint8 (N, H, W, 3), also of one image, or (N, H, W)"
            raise DataError(f"{path} holds {kind} {shape}: {expected}")
        if labels is None or not labelled:
            labels = np.full(shape[0], None)
        if labels.shape != shape[:1]:
            raise DataError(f"labels of {path} are {labels.shape}: expected ({shape[0]},)")
        self.class_names, self.labels = classes(labels.tolist(), source=str(path))
        self._fingerprint = digest([self.class_names, self.labels.tolist()], [hash_file(path)])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.ascontiguousarray(self._images[index])
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        return image, int(self.labels[index])


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy; `np.load` would advise to unpickle another file."""
    with raised_as(DataError, f"{path} cannot be read as a NumPy array, get it again"):
        return np.lib.format.open_memmap(path, mode="r")
