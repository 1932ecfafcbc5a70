"""Images in tables: Parquet and Arrow files as Hugging Face `datasets` writes them."""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from erw.data.images import WHITE, Unreadable
from erw.data.sources.base import LabelledImages, digest, ending, listed
from erw.data.sources.labels import classes, label_name
from erw.errors import DataError, one_line
from erw.io import hash_file

_IMAGES = ("image", "img", "jpg", "png", "webp")
_CELL = "(large_)?(binary|string)(_view)?|null"


class Table(LabelledImages):
    """Rows of Parquet or Arrow files, in the order of their names.

    An image column holds {"bytes", "path"} as `datasets` stores images, plain bytes, or paths,
    which are relative to the first file; a label column whole numbers or text, with class names
    from the metadata of `datasets` if it is there. `columns` names the two, or the first alone,
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
        with _errors(first):
            schema = _open(first).schema
        notes: list[str] = []
        self._image, label = _columns(first, schema, columns, notes if labelled else None)
        self.notes = tuple(notes)
        names = _class_names(schema, label)
        values: list[Any] = []
        self._blocks: list[tuple[int, int]] = []  # (file, row group) of each block of rows
        sizes: list[int] = []
        for number, path in enumerate(self.paths):
            with _errors(path):
                file = _open(path)
                _check(path, file.schema, self._image, label, names, first)
                for group, rows in enumerate(file.rows):
                    self._blocks.append((number, group))
                    sizes.append(rows)
                    values += file.column(group, label).to_pylist() if label else [None] * rows
        self._ends = list(accumulate(sizes))
        if not values:
            raise DataError(f"{first} has no rows")
        place = f"{first}, column {label}" if label else str(first)
        self.class_names, numbers = classes(values, source=place, names=names)
        self.labels = np.asarray(numbers, dtype=np.int32)
        hashes = [f"{path.name} {hash_file(path)}\n" for path in self.paths]
        self._fingerprint = digest([self.class_names, background, *columns], hashes)
        # A few blocks are cached, since threads are asked for rows in order.
        self._block = lru_cache(maxsize=4)(self._read_block)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. Raises `Unreadable`."""
        block = bisect_right(self._ends, index)
        try:
            value = self._block(block)[index - (self._ends[block - 1] if block else 0)].as_py()
            if not isinstance(value, dict):
                value = {"path" if isinstance(value, str) else "bytes": value}
            if value.get("bytes") is None and value.get("path"):
                return (self.paths[0].parent / value["path"]).read_bytes()
        except (OSError, IndexError, _pyarrow().ArrowException) as error:
            raise Unreadable(f"damaged inside the table ({one_line(error, 120)})") from error
        if value.get("bytes") is None:
            raise Unreadable("empty cell")
        return value["bytes"]

    def _read_block(self, block: int) -> Any:
        number, group = self._blocks[block]
        return _open(self.paths[number]).column(group, self._image)

    def location(self, index: int) -> str:
        """The file and row of image `index`."""
        number, _ = self._blocks[bisect_right(self._ends, index)]
        before = [end for (n, _), end in zip(self._blocks, self._ends, strict=True) if n < number]
        return f"{self.paths[number]}[{index - max(before, default=0)}]"


class _File(NamedTuple):
    """A table's file: rows of each block, and (block, column) -> Arrow array."""

    schema: Any
    rows: list[int]
    column: Callable[[int, str], Any]


def _open(path: Path) -> _File:
    """A Parquet file by row groups; an Arrow file, memory-mapped, as one block."""
    pyarrow = _pyarrow()
    from pyarrow import ipc, parquet

    if ending(path.name) == ".parquet":
        file = parquet.ParquetFile(path)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return _File(file.schema_arrow, rows, lambda i, n: file.read_row_group(i, [n]).column(0))
    mapped = pyarrow.memory_map(str(path))
    try:
        table = ipc.open_file(mapped).read_all()
    except pyarrow.ArrowInvalid:  # the stream format, which `datasets` writes
        mapped.seek(0)
        table = ipc.open_stream(mapped).read_all()
    return _File(table.schema, [len(table)], lambda _, name: table.column(name))


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f'Parquet and Arrow files need pyarrow ({error}): pip install "erw[parquet]"'
        ) from error
    return pyarrow


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises into a `DataError` that names the file."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError, KeyError) as error:
        kind = path.suffix[1:]
        raise DataError(f"{path} cannot be read as {kind} ({one_line(error, 120)})") from error


def _columns(
    path: Path, schema: Any, columns: Sequence[str], notes: list[str] | None
) -> tuple[str, str | None]:
    """The image and the label column: as given, by their usual names, by their features.

    `notes` gets what is not used; None: take no labels.
    """
    names = schema.names
    if missing := [name for name in columns if name not in names]:
        raise DataError(f"{path} has no column {missing[0]}: found {', '.join(names)}")
    usual = [name for name in (*columns[:1], *_IMAGES) if name in names]
    image = usual[0] if usual else _by_feature(path, schema, "Image")
    if image is None:
        raise DataError(
            f"{path} has no image column: found {', '.join(names)}; name the image and the label "
            "column with --columns"
        )
    if notes is None or len(columns) > 1:
        return image, None if notes is None else columns[1]
    rest = [name for name in names if name != image]
    label = label_name(rest, notes, usual=True) or _by_feature(path, schema, "ClassLabel")
    return image, label or label_name(rest, notes)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote of each column, from its metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _by_feature(path: Path, schema: Any, kind: str) -> str | None:
    """The one column of that kind of feature."""
    features = _features(schema).items()
    columns = [n for n, meta in features if meta.get("_type") == kind and n in schema.names]
    if len(columns) > 1:
        other = ", or take no labels with --classes none" if kind == "ClassLabel" else ""
        raise DataError(
            f"{path} has several {kind} columns ({', '.join(columns)}): name the image and the "
            f"label column with --columns{other}"
        )
    return columns[0] if columns else None


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Names of a ClassLabel feature."""
    names = _features(schema).get(label or "", {}).get("names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _check(
    path: Path, schema: Any, image: str, label: str | None, names: tuple[str, ...], first: Path
) -> None:
    """That a file has images in that column, and the columns and class names of the first."""
    if missing := [name for name in (image, label) if name and name not in schema.names]:
        raise DataError(f"{path} has no column {missing[0]}, as {first} has: read such files apart")
    kind = schema.field(image).type
    struct = _pyarrow().types.is_struct(kind)
    cells = [field.type for field in kind if field.name in ("bytes", "path")] if struct else [kind]
    if not cells or not all(re.fullmatch(_CELL, str(cell)) for cell in cells):
        raise DataError(
            f"{path}: image column {image} has type {kind}, expected bytes, path or "
            '{"bytes", "path"}; name another with --columns'
        )
    if (own := _class_names(schema, label)) != names:  # one number would mean two classes
        raise DataError(
            f"{path} and {first} have different class names ({listed(own) or 'none'}; "
            f"{listed(names) or 'none'}): write both with one list, or take no labels with "
            "--classes none"
        )
