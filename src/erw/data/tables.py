"""Images in tables: Parquet and Arrow as Hugging Face `datasets` writes them; NumPy arrays."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from ..errors import DataError, one_line
from .images import WHITE, Unreadable, decode
from .labels import classes
from .shards import hash_file

IMAGES, LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "fine_label", "cls")
_ARRAYS = ("images", "image", "x", "data", "arr_0")


class Table:
    """Rows of Parquet or Arrow files, in the order of their names.

    An image column holds {"bytes", "path"} as `datasets` stores images, or plain bytes; a label
    column whole numbers, with class names from the metadata of `datasets` if it is there, or text.
    `columns` names the two, or the first alone, where they have unusual names. Needs pyarrow
    (extra `parquet`).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        labelled: bool = True,
        background: tuple[int, int, int] = WHITE,
        columns: Sequence[str] = (),
    ) -> None:
        self.paths, self.background = tuple(sorted(paths)), background
        first = self.paths[0]
        self.name = first.parent.name if len(self.paths) > 1 else first.name
        schema = _schema(first)
        if missing := [name for name in columns if name not in schema.names]:
            raise DataError(f"{first} has no column {missing[0]}: found {', '.join(schema.names)}")
        self._image = _column(schema, columns[:1] or IMAGES)
        if self._image is None:
            raise DataError(
                f"{first} has no image column: found {', '.join(schema.names)}; name the image and "
                "the label column with --columns"
            )
        label = _column(schema, columns[1:2] or LABELS) if labelled else None
        told: list[Any] = []
        ends: list[int] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each block of rows
        for number, path in enumerate(self.paths):
            with _opening(path):
                for group, rows in enumerate(_groups(path)):
                    self._groups.append((number, group))
                    ends.append((ends[-1] if ends else 0) + rows)
                told += _labels(path, label)
        self._ends = ends
        if not ends or not ends[-1]:
            raise DataError(f"{first} has no rows")
        self.class_names, labels = classes(told, where=str(first))
        if names := _class_names(schema, label):
            if len(self.class_names) > len(names):
                raise DataError(f"{first}: label {max(labels)} but only {len(names)} class names")
            self.class_names = names
        self._labels = np.asarray(labels, dtype=np.int32)
        digest = blake3(json.dumps([self.class_names, background, *columns]).encode())
        for path in self.paths:
            digest.update(f"{path.name} {hash_file(path)}\n".encode())
        self._fingerprint = digest.hexdigest()[:32]
        # A few blocks are kept, since threads are asked for rows in order.
        self._block = lru_cache(maxsize=4)(self._read)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        block = bisect_right(self._ends, index)
        before = self._ends[block - 1] if block else 0
        try:
            value = self._block(block)[index - before].as_py()
        except (OSError, IndexError, _pyarrow().ArrowException) as error:
            raise Unreadable(f"damaged inside the table ({one_line(error, 120)})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            path = Path(value["path"])
            data = path if path.is_absolute() else self.paths[0].parent / path
        if data is None:
            raise Unreadable("empty cell")
        return decode(data, background=self.background), int(self._labels[index])

    def _read(self, block: int) -> Any:
        number, group = self._groups[block]
        path = self.paths[number]
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.ParquetFile(path).read_row_group(group, [self._image]).column(0)
        with _arrow(path) as stream:
            return stream[group].column(stream[group].schema.get_field_index(self._image))

    def where(self, index: int) -> str:
        """The file and row of image `index`."""
        block = bisect_right(self._ends, index)
        number = self._groups[block][0]
        first = next(i for i, (file, _) in enumerate(self._groups) if file == number)
        return f"{self.paths[number]}[{index - (self._ends[first - 1] if first else 0)}]"

    def fingerprint(self) -> str:
        """Of the files' names and content, class names and the background colour."""
        return self._fingerprint


class Arrays:
    """NumPy images, uint8 (N, H, W, 3) or (N, H, W), memory-mapped from .npy, or from an .npz.

    Labels come from the .npz ("labels" or "label") or from NAME_labels.npy beside NAME.npy.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self.path, self.name = path, path.name
        labels: np.ndarray | None = None
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as held:
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
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read as NumPy arrays ({error})") from error
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


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f'Parquet and Arrow files need pyarrow ({error}): pip install "erw[parquet]"'
        ) from error
    return pyarrow


class _arrow:
    """An Arrow file, in file or stream format, memory-mapped: a sequence of record batches."""

    def __init__(self, path: Path) -> None:
        pyarrow = _pyarrow()
        from pyarrow import ipc

        self._map = pyarrow.memory_map(str(path))
        try:
            reader = ipc.open_file(self._map)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:
            self._map.seek(0)
            reader = ipc.open_stream(self._map)
            self._batches = list(reader)
        self.schema = reader.schema

    def __enter__(self) -> "_arrow":
        return self

    def __exit__(self, *_: object) -> None:
        pass  # batches keep the map alive as long as they live

    def __getitem__(self, index: int) -> Any:
        return self._batches[index]

    def __len__(self) -> int:
        return len(self._batches)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises into a `DataError` that names the file."""
    pyarrow = _pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        kind = path.suffix[1:]
        raise DataError(f"{path} cannot be read as {kind} ({one_line(error, 120)})") from error


def _schema(path: Path) -> Any:
    with _opening(path):
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_schema(path)
        with _arrow(path) as stream:
            return stream.schema


def _groups(path: Path) -> list[int]:
    """Rows of each block that is read at once."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        told = parquet.read_metadata(path)
        return [told.row_group(i).num_rows for i in range(told.num_row_groups)]
    with _arrow(path) as stream:
        return [stream[i].num_rows for i in range(len(stream))]


def _labels(path: Path, column: str | None) -> list[Any]:
    if column is None:
        return [None] * sum(_groups(path))
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path, columns=[column]).column(0).to_pylist()
    with _arrow(path) as stream:
        return [label for i in range(len(stream)) for label in stream[i][column].to_pylist()]


def _column(schema: Any, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel feature, from the metadata that `datasets` writes."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, told["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
