"""Images in tables: Parquet and Arrow as Hugging Face `datasets` writes them."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from erw.data.images import WHITE, Unreadable, decode
from erw.data.labels import classes
from erw.data.shards import hash_file
from erw.errors import DataError, one_line

IMAGES, LABELS = ("image", "img", "jpg", "png", "webp"), ("label", "labels", "fine_label", "cls")
_TEXT = ("string", "large_string", "string_view")
_CELLS = ("binary", "large_binary", "binary_view", *_TEXT)


class Table:
    """Rows of Parquet or Arrow files, in the order of their names.

    An image column holds {"bytes", "path"} as `datasets` stores images, plain bytes, or paths,
    which are relative to the first file; a label column whole numbers, with class names from the
    metadata of `datasets` if it is there, or text. `columns` names the two, or the first alone,
    where neither usual names nor that metadata tell. Needs pyarrow (extra `parquet`).
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
        image = _column(first, schema, columns[:1] or IMAGES, "Image")
        if image is None:
            raise DataError(
                f"{first} has no image column: found {', '.join(schema.names)}; name the image and "
                "the label column with --columns"
            )
        self._image, label = image, None
        if labelled:
            label = _column(first, schema, columns[1:2] or LABELS, "ClassLabel")
        names = _class_names(schema, label)
        told: list[Any] = []
        ends: list[int] = []
        self._groups: list[tuple[int, int]] = []  # (file, row group) of each block of rows
        for number, path in enumerate(self.paths):
            _check(path, image, label, names, first)
            with _opening(path):
                for group, rows in enumerate(_groups(path)):
                    self._groups.append((number, group))
                    ends.append((ends[-1] if ends else 0) + rows)
                told += _labels(path, label)
        self._ends = ends
        if not ends or not ends[-1]:
            raise DataError(f"{first} has no rows")
        self.class_names, labels = classes(told, where=str(first))
        if names:
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
        if not isinstance(value, dict):
            value = {"path" if isinstance(value, str) else "bytes": value}
        data = value.get("bytes")
        if data is None and value.get("path"):
            data = self.paths[0].parent / value["path"]  # which an absolute path overrides
        if data is None:
            raise Unreadable("empty cell")
        return decode(data, background=self.background), int(self._labels[index])

    def _read(self, block: int) -> Any:
        number, group = self._groups[block]
        path = self.paths[number]
        if _is_parquet(path):
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


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _schema(path: Path) -> Any:
    with _opening(path):
        if _is_parquet(path):
            from pyarrow import parquet

            return parquet.read_schema(path)
        with _arrow(path) as stream:
            return stream.schema


def _groups(path: Path) -> list[int]:
    """Rows of each block that is read at once."""
    if _is_parquet(path):
        from pyarrow import parquet

        told = parquet.read_metadata(path)
        return [told.row_group(i).num_rows for i in range(told.num_row_groups)]
    with _arrow(path) as stream:
        return [stream[i].num_rows for i in range(len(stream))]


def _labels(path: Path, column: str | None) -> list[Any]:
    if column is None:
        return [None] * sum(_groups(path))
    if _is_parquet(path):
        from pyarrow import parquet

        return parquet.read_table(path, columns=[column]).column(0).to_pylist()
    with _arrow(path) as stream:
        return [label for i in range(len(stream)) for label in stream[i][column].to_pylist()]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote of each column, from its metadata."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in told.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _column(path: Path, schema: Any, names: Sequence[str], kind: str) -> str | None:
    """The first of `names` that is there, else the one column of that kind of feature."""
    if named := [name for name in names if name in schema.names]:
        return named[0]
    features = _features(schema).items()
    found = [n for n, told in features if told.get("_type") == kind and n in schema.names]
    if len(found) > 1:
        other = ", or take no labels with --classes none" if kind == "ClassLabel" else ""
        raise DataError(
            f"{path} has several {kind} columns ({', '.join(found)}): name the image and the label "
            f"column with --columns{other}"
        )
    return found[0] if found else None


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel feature."""
    names = _features(schema).get(label or "", {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _check(path: Path, image: str, label: str | None, names: tuple[str, ...], first: Path) -> None:
    """That the columns of one file hold images and labels, named as those of the first file."""
    schema = _schema(path)
    if missing := [name for name in (image, label) if name and name not in schema.names]:
        raise DataError(f"{path} has no column {missing[0]}, as {first} has: keep such files apart")
    if not _holds_images(kind := schema.field(image).type):
        raise DataError(
            f"{path}: image column {image} has type {kind}, expected bytes, path or "
            '{"bytes", "path"}; name another with --columns'
        )
    if label is None:
        return
    kind = _plain(schema.field(label).type)
    if not (_pyarrow().types.is_integer(kind) or str(kind) in ("null", *_TEXT)):
        raise DataError(
            f"{path}: label column {label} has type {kind}, expected whole numbers or text; name "
            "another with --columns, or take no labels with --classes none"
        )
    own = _class_names(schema, label)
    for number, (here, there) in enumerate(zip_longest(own, names)):
        if here != there:  # the same number would mean one class here and another there
            raise DataError(
                f"{path} and {first} have different class names (label {number}: {here} and "
                f"{there}): write both with one list, or take no labels with --classes none"
            )


def _plain(kind: Any) -> Any:
    """The type of the values, of a dictionary-encoded column too."""
    return kind.value_type if _pyarrow().types.is_dictionary(kind) else kind


def _holds_images(kind: Any) -> bool:
    kind = _plain(kind)
    if not _pyarrow().types.is_struct(kind):
        return str(kind) in _CELLS
    held = [
        str(kind.field(i).type)
        for i in range(kind.num_fields)
        if kind.field(i).name in ("bytes", "path")
    ]
    return bool(held) and set(held) <= {"null", *_CELLS}
