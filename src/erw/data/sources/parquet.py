"""Images in tables: Parquet and Arrow files as Hugging Face `datasets` writes them."""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from erw.data.images import WHITE, Unreadable
from erw.data.sources.base import EncodedImages, digest, listed
from erw.data.sources.labels import classes, label_name
from erw.errors import DataError, one_line
from erw.io import hash_file

_IMAGES = ("image", "img", "jpg", "png", "webp")
_CELL = "(large_)?(binary|string)(_view)?|null"


class Table(EncodedImages):
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
        schema = _schema(first)
        if missing := [name for name in columns if name not in schema.names]:
            raise DataError(f"{first} has no column {missing[0]}: found {', '.join(schema.names)}")
        usual = next((name for name in _IMAGES if name in schema.names), None)
        image = columns[0] if columns else usual or _column(first, schema, "Image")
        if image is None:
            raise DataError(
                f"{first} has no image column: found {', '.join(schema.names)}; name the image and "
                "the label column with --columns"
            )
        label = None
        if labelled and len(columns) > 1:
            label = columns[1]
        elif labelled:
            # The name first: of several ClassLabels the usual one is meant.
            rest = [name for name in schema.names if name != image]
            label = label_name(rest, usual=True) or _column(first, schema, "ClassLabel")
            label = label or label_name(rest)
        self._image, names = image, _class_names(schema, label)
        values: list[Any] = []
        self._blocks: list[tuple[int, int]] = []  # (file, row group) of each block of rows
        sizes: list[int] = []
        for number, path in enumerate(self.paths):
            _check(path, image, label, names, first)
            with _errors(path):
                rows = _row_groups(path)
                values += _values(path, label) if label else [None] * sum(rows)
            sizes += rows
            self._blocks += [(number, group) for group in range(len(rows))]
        self._ends = list(accumulate(sizes))
        if not values:
            raise DataError(f"{first} has no rows")
        self.class_names, numbers = classes(
            values, where=f"{first}, column {label}" if label else str(first), names=names
        )
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
        except _pyarrow().ArrowException as error:
            raise Unreadable(f"damaged inside the table ({one_line(error, 120)})") from error
        except (OSError, IndexError) as error:  # pyarrow raises these for a damaged page, too
            raise Unreadable(f"damaged inside the table ({one_line(error, 120)})") from error
        if value.get("bytes") is None:
            raise Unreadable("empty cell")
        return value["bytes"]

    def _read_block(self, block: int) -> Any:
        number, group = self._blocks[block]
        path = self.paths[number]
        if _is_parquet(path):
            from pyarrow import parquet

            return parquet.ParquetFile(path).read_row_group(group, [self._image]).column(0)
        return _arrow(path).column(self._image)

    def where(self, index: int) -> str:
        """The file and row of image `index`."""
        number, _ = self._blocks[bisect_right(self._ends, index)]
        before = [end for (n, _), end in zip(self._blocks, self._ends, strict=True) if n < number]
        return f"{self.paths[number]}[{index - max(before, default=0)}]"


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
    pyarrow = _pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        kind = path.suffix[1:]
        raise DataError(f"{path} cannot be read as {kind} ({one_line(error, 120)})") from error


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _arrow(path: Path) -> Any:
    """An Arrow file as a memory-mapped table; `datasets` writes the stream format."""
    pyarrow = _pyarrow()
    from pyarrow import ipc

    file = pyarrow.memory_map(str(path))
    try:
        return ipc.open_file(file).read_all()
    except pyarrow.ArrowInvalid:
        file.seek(0)
        return ipc.open_stream(file).read_all()


def _schema(path: Path) -> Any:
    with _errors(path):
        if _is_parquet(path):
            from pyarrow import parquet

            return parquet.read_schema(path)
        return _arrow(path).schema


def _row_groups(path: Path) -> list[int]:
    """Rows of each block that is read at once; an Arrow file is one, since it is mapped."""
    if _is_parquet(path):
        from pyarrow import parquet

        meta = parquet.read_metadata(path)
        return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    return [len(_arrow(path))]


def _values(path: Path, column: str) -> list[Any]:
    if _is_parquet(path):
        from pyarrow import parquet

        return parquet.read_table(path, columns=[column]).column(0).to_pylist()
    return _arrow(path).column(column).to_pylist()


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote of each column, from its metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _column(path: Path, schema: Any, kind: str) -> str | None:
    """The one column of that kind of feature."""
    features = _features(schema).items()
    found = [n for n, meta in features if meta.get("_type") == kind and n in schema.names]
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
    """That one file has the columns and class names of the first, and images in the one."""
    schema = _schema(path)
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
    own = _class_names(schema, label)
    if own != names:  # the same number would mean one class here and another there
        pairs = zip(own, names, strict=False)
        number = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(names)))
        raise DataError(
            f"{path} and {first} have different class names (label {number}: "
            f"{listed(own[number : number + 1]) or None} and "
            f"{listed(names[number : number + 1]) or None}): write both with one list, or take no "
            "labels with --classes none"
        )
