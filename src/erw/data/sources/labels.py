"""Which class an image belongs to: every rule by which labels are found, in one place.

Sources bring values (a number, a name or None for each image); `classes` makes labels of them.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from posixpath import basename, dirname, splitext
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from erw.data.images import EXTENSIONS
from erw.data.sources.base import ending, listed
from erw.errors import DataError, one_line

if TYPE_CHECKING:
    from erw.data.sources.files import Files

Labels = tuple[tuple[str, ...], list[int]]  # names of the classes; the number of each image's class

CLASSES = ("auto", "folders", "leaf", "none")
TABLES = ("dataset.json", "metadata.csv", "metadata.jsonl")
# Names that mean a label, in JSON, tables and arrays. The first of `USUAL` that is there is taken;
# of the others only one that is there alone.
USUAL = ("label", "labels", "fine_label", "cls")
OTHERS = (
    "class", "class_id", "class_label", "category", "category_id", "target", "targets", "y",
    "coarse_label",
)  # fmt: skip
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_READERS: dict[str, Callable[[str], Any]] = {
    ".cls": int,
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.splitlines() if line.strip()],
    ".csv": lambda text: list(csv.DictReader(io.StringIO(text))),
}


def label_name(names: Sequence[str], notes: list[str], *, usual: bool = False) -> str | None:
    """Which of these names of columns, keys or arrays means the label; `usual`: if it is usual."""
    if common := [name for name in USUAL if name in names]:
        return common[0]
    others = [name for name in OTHERS if name in names and not usual]
    if len(others) > 1:
        notes.append(
            f"{' and '.join(others)} may be labels and are not used: rename the one that is to "
            "label, or name it with --columns IMAGE LABEL"
        )
    return others[0] if len(others) == 1 else None


def classes(values: Sequence[Any], *, source: str, names: Sequence[str] = ()) -> Labels:
    """Labels from one value an image: all numbers, all names, or all None (no classes).

    `names` are the classes' names in order, where a file lists them; otherwise numbers are names.
    Raises `DataError` for a value that is neither, is missing or not in the list, and for a mix.
    """
    if not values:
        raise DataError(f"{source} holds no images")
    values = [normalize("NFC", value) if isinstance(value, str) else value for value in values]
    if not (bare := values.count(None)) < len(values):
        return (), [0] * len(values)
    if bare:
        raise DataError(
            f"{source}: {bare} of {len(values)} images have no label; give all of them one, or "
            "take none with --classes none"
        )
    known = tuple(normalize("NFC", name) for name in names)
    numbers: dict[Any, int] = {}
    kinds = {type(value) for value in values}
    if kinds == {str}:
        known = known or tuple(sorted(set(values)))
        numbers = {name: number for number, name in enumerate(known)}
    elif kinds == {int}:
        known = known or tuple(map(str, range(max(values) + 1)))
        numbers = {number: number for number in range(len(known))}
    for value in values:
        if type(value) not in (int, str) or value not in numbers:
            raise DataError(
                f"{source}: label {value!r}, expected a class number from 0 or a name, the same "
                f"for all{f', one of {listed(known)}' if names else ''}; or take --classes none"
            )
    return known, [numbers[value] for value in values]


def find(files: "Files", rule: str, notes: list[str]) -> tuple[list[str], Labels]:
    """The images among some files, sorted, and their labels by one of the rules `CLASSES`.

    "auto" takes the first of tables (`TABLES`), label files of a WebDataset, and folders. What
    looks like labels and is not used goes to `notes`.
    """
    sides = _samples(files, notes)
    images = sorted(sides) or _images(files.entries)
    used = {*images, *sides.values()}
    rest = [key for key in files.entries if key not in used and basename(key) not in TABLES]
    if rest:
        kinds = Counter(ending(key) or "no ending" for key in rest).most_common(3)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds)
        notes.append(f"{len(rest)} other files are left alone ({counted})")
    labels = None
    if rule == "auto" and images:
        labels = _of_tables(files, images, notes)
        if labels is None and sides:
            values = [side and _of_side(files, side, []) for _, side in sorted(sides.items())]
            labels = classes(values, source=str(files.root))
    if rule != "none" and labels is None:
        labels = _of_folders(files, images, rule)
    parents = [files.inside(key).split("/")[:-1] for key in images]
    splits = sorted(set(_outermost(parents))) if all(parents) else []
    if len(splits) > 1 and all(name.lower() in SPLITS for name in splits):
        notes.append(
            f"{' and '.join(splits)} look like splits and are read as one set: take one with "
            f"--split {splits[-1]}"
        )
    return images, labels or ((), [0] * len(images))


def _images(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if ending(key) in EXTENSIONS]


def _samples(files: "Files", notes: list[str]) -> dict[str, str | None]:
    """The images of a WebDataset, each with its label file; {} if no image has one.

    Files of one name up to the first dot make a sample; names that differ after it make one each if
    each has a label file of its own (v1.0.jpg, v1.0.cls). Labels are NAME.cls, or NAME.json with a
    label in it where the images lie in no class folders: there JSON may mean anything. Of several
    images in a sample the one whose ending has one dot is meant.
    """
    if not any(ending(key) in (".cls", ".json") for key in files.entries):
        return {}
    groups: dict[str, list[str]] = {}
    for key in files.entries:
        groups.setdefault(f"{dirname(key)}/{basename(key).partition('.')[0]}", []).append(key)
    samples = [keys for keys in groups.values() if _images(keys)]
    last = {ending(key): key for keys in samples for key in keys}
    kind = ".cls" if ".cls" in last else ".json"
    flat = len({dirname(files.inside(key)) for keys in samples for key in keys}) == 1
    if kind not in last or (
        kind == ".json" and not (flat and _of_side(files, last[kind], notes) is not None)
    ):
        return {}
    result: dict[str, str | None] = {}
    for keys in samples:
        sides = {splitext(key)[0]: key for key in keys if ending(key) == kind}
        own = {image: sides.get(splitext(image)[0]) for image in _images(keys)}
        if len({*own.values()} - {None}) < len(own):
            images = [key for key in own if basename(key).count(".") == 1] or [*own]
            if len(images) > 1 or len(sides) > 1:
                several = listed([files.location(key) for key in (*images, *sides.values())])
                raise DataError(f"one sample has several images or labels: {several}; leave one")
            own = {images[0]: next(iter(sides.values()), None)}
        result |= own
    return result


def _parsed(files: "Files", key: str) -> Any:
    """What a file with labels holds."""
    try:
        return _READERS[ending(key)](files.read(key).decode("utf-8-sig"))
    except Exception as error:
        kind = ending(key)[1:].upper()
        message = f"{files.location(key)} is not readable as {kind} ({one_line(error)})"
        raise DataError(message) from error


def _of_side(files: "Files", key: str, notes: list[str]) -> Any:
    """The label in a file beside an image."""
    value = _parsed(files, key)
    return value.get(label_name(list(value), notes)) if isinstance(value, dict) else value


def _of_tables(files: "Files", images: Sequence[str], notes: list[str]) -> Labels | None:
    """Labels of dataset.json (edm2, REPA), metadata.csv and metadata.jsonl (`datasets`)."""
    known: dict[str, Any] = {}
    names: Sequence[str] = ()
    used = ""
    for key in (key for key in files.entries if basename(key) in TABLES):
        place, table = files.location(key), _parsed(files, key)
        if isinstance(table, dict):
            table, names = _of_json(table, place)
        else:
            table = _of_metadata(table, key.endswith(".csv"), notes)
        if table is None:
            notes.append(f"{place} names no labels and is left alone")
            continue
        used, base = place, key[: key.rfind("/") + 1]
        for path, value in table:
            path = normalize("NFC", str(path).replace("\\", "/").removeprefix("./"))
            path = path if path.startswith(base) else base + path
            if known.setdefault(path, value) != value:
                raise DataError(f"{place} gives {path} two labels: {known[path]} and {value}")
    if not known:  # no table that names labels, or "labels": null
        return ((), [0] * len(images)) if used else None
    values = [known.get(normalize("NFC", image)) for image in images]
    if None in values:
        raise DataError(f"{used} has no label for {images[values.index(None)]}")
    return classes(values, source=used, names=names)


def _of_json(table: dict[str, Any], place: str) -> tuple[list[Any] | None, Sequence[str]]:
    """(path, label) of every image in a dataset.json, None if it lists none; and class names."""
    rows, names = table.get("labels"), table.get("class_names") or []
    if rows is None:
        return ([] if "labels" in table else None), ()
    rows = list(rows.items()) if isinstance(rows, dict) else rows
    good = isinstance(rows, list) and all(isinstance(r, list | tuple) and len(r) == 2 for r in rows)
    if not (good and rows and isinstance(names, list)):
        raise DataError(
            f'{place}: expected "labels", null or a list of [path, class number], and, if at all, '
            '"class_names", a list of names'
        )
    return rows, list(map(str, names))


def _of_metadata(table: Any, text: bool, notes: list[str]) -> list[Any] | None:
    """(path, label) of every image in a metadata table; None without a column of labels."""
    rows = [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []
    label = label_name(list(rows[0]), notes) if rows else None
    if label is None or "file_name" not in rows[0]:
        return None
    numbers = text and all(str(row.get(label)).isdecimal() for row in rows)
    return [(row.get("file_name"), int(row[label]) if numbers else row.get(label)) for row in rows]


def _of_folders(files: "Files", images: Sequence[str], rule: str) -> Labels | None:
    """Classes named by folders, sorted by code point; None without any."""
    paths = [files.inside(key) for key in images]
    if not any("/" in path for path in paths) and paths != list(images):  # flat archives
        if rule == "auto":
            raise DataError(
                f"several archives such as {files.root} hold images without labels or folders: "
                "give --classes folders to make each archive a class, or --classes none for none"
            )
        paths = [key.replace(".tar/", "/") for key in images]
    parents = [normalize("NFC", path).split("/")[:-1] for path in paths]
    if not any(parents):
        return None
    if loose := parents.count([]):
        raise DataError(
            f"{files.root} holds {loose} images beside class folders: move them into one, "
            "or take all without labels with --classes none"
        )
    leaf = ["/".join(parts) for parts in parents]
    labels = classes(leaf if rule == "leaf" else _outermost(parents), source=str(files.root))
    return None if rule == "auto" and len(labels[0]) == 1 else labels  # a flat set in a folder


def _outermost(parents: Sequence[list[str]]) -> list[str]:
    """The outermost folder with siblings of each image. A wrapper such as data/ has none."""
    depth = 0
    while all(len(p) > depth + 1 for p in parents) and len({p[depth] for p in parents}) == 1:
        depth += 1
    return [parts[depth] for parts in parents]
