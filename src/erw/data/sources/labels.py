"""Which class an image belongs to: every rule by which labels are found, in one place.

Sources bring values (a number, a name or None for each image); `classes` makes labels of them.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from posixpath import basename
from typing import Any, NamedTuple
from unicodedata import normalize

from erw.data.images import EXTENSIONS
from erw.data.sources.base import Files, ending, listed
from erw.errors import DataError, one_line

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


class Labels(NamedTuple):
    """Names of the classes, () without any, and the class number of each image."""

    names: tuple[str, ...]
    numbers: list[int]


def label_name(names: Sequence[str], notes: list[str], *, usual: bool = False) -> str | None:
    """Which of these names of columns, keys or arrays means the label; `usual`: if it is usual.

    Of several others none is taken; `notes` gets a line about them.
    """
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

    Raises:
        DataError: some images have a label and others not, numbers and names are mixed, or a value
            is neither or not listed.
    """
    if not values:
        raise DataError(f"{source} holds no images")
    kinds = {type(value) for value in values}
    if kinds == {type(None)}:
        return Labels((), [0] * len(values))
    if type(None) in kinds:
        bare = sum(value is None for value in values)
        raise DataError(
            f"{source}: {bare} of {len(values)} images have no label; give all of them one, or "
            "take none with --classes none"
        )
    if kinds == {str}:
        texts = [normalize("NFC", value) for value in values]
        known = tuple(normalize("NFC", name) for name in names) or tuple(sorted(set(texts)))
        number = {name: label for label, name in enumerate(known)}
        if missing := sorted(set(texts) - set(known)):
            raise DataError(
                f"{source}: label {missing[0]!r} is not in the list of {len(known)} class names "
                f"({listed(known)})"
            )
        return Labels(known, [number[text] for text in texts])
    if kinds != {int}:
        odd = next((v for v in values if type(v) not in (int, str)), None)
        what = "labels mix numbers and names" if odd is None else f"label {odd!r}"
        raise DataError(
            f"{source}: {what}, expected a class number or name for each; take none with "
            "--classes none"
        )
    low, high = min(values), max(values)
    if low < 0:
        raise DataError(
            f"{source}: label {low}, expected a class number from 0; take none with --classes none"
        )
    if names and high >= len(names):
        raise DataError(f"{source}: label {high} but only {len(names)} class names")
    return Labels(tuple(names) or tuple(map(str, range(high + 1))), list(values))


def find(files: Files, rule: str, notes: list[str]) -> tuple[list[str], Labels]:
    """The images among some files, sorted, and their labels by one of the rules `CLASSES`.

    "auto" takes the first of tables (`TABLES`), label files of a WebDataset, and folders. What
    looks like labels and is not used goes to `notes`.
    """
    sides = _samples(files, notes)
    images = sorted(sides) or [e.key for e in files.entries if ending(e.key) in EXTENSIONS]
    used = {*images, *sides.values()}
    rest = [entry.key for entry in files.entries if entry.key not in used]
    others = Counter(ending(key) or "no ending" for key in rest if basename(key) not in TABLES)
    if others:
        counted = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3))
        notes.append(f"{others.total()} other files are left alone ({counted})")
    labels = None
    if rule == "auto" and images:
        labels = _of_tables(files, images, notes)
        if labels is None and sides:
            values = [_of_side(files, side, []) if (side := sides[key]) else None for key in images]
            labels = classes(values, source=str(files.root))
    if rule != "none" and images and labels is None:
        labels = _of_folders(files, images, rule)
    parents = [files.inside(key).split("/")[:-1] for key in images]
    splits = sorted(set(_outermost(parents))) if all(parents) else []
    if len(splits) > 1 and all(name.lower() in SPLITS for name in splits):
        notes.append(
            f"{' and '.join(splits)} look like splits and are read as one set: take one with "
            f"--split {splits[-1]}"
        )
    return images, labels or Labels((), [0] * len(images))


def _samples(files: Files, notes: list[str]) -> dict[str, str | None]:
    """The images of a WebDataset, each with its label file; {} if no image has one.

    Files of one name up to the first dot make a sample; names that differ after it make one each if
    each has a label file of its own (v1.0.jpg, v1.0.cls). Labels are NAME.cls, or NAME.json with a
    label in it where the images lie in no class folders. Of several images in a sample the one
    whose ending has one dot is meant.
    """
    groups: dict[str, list[str]] = {}
    if any(ending(entry.key) in (".cls", ".json") for entry in files.entries):
        for key, *_ in files.entries:
            folder, _, name = key.rpartition("/")
            groups.setdefault(f"{folder}/{name.partition('.')[0]}", []).append(key)
    samples = [keys for keys in groups.values() if _images(keys)]
    kind = _side_kind(files, samples, notes)
    sides_of: dict[str, str | None] = {}
    for keys in samples if kind else ():
        images, sides = _images(keys), [key for key in keys if ending(key) == kind]
        own = {side.rpartition(".")[0]: side for side in sides}
        if len(images) > 1 and all(image.rpartition(".")[0] in own for image in images):
            sides_of |= {image: own[image.rpartition(".")[0]] for image in images}
            continue
        plain = [key for key in images if key.rpartition("/")[2].count(".") == 1]
        image, *more = images if len(images) == 1 else plain or images
        if more or len(sides) > 1:
            several = listed([files.location(key) for key in (images if more else sides)])
            what = "images" if more else "labels"
            raise DataError(f"one sample of a WebDataset has several {what}: {several}; leave one")
        sides_of[image] = sides[0] if sides else None
    return sides_of


def _images(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if ending(key) in EXTENSIONS]


def _side_kind(files: Files, samples: Sequence[list[str]], notes: list[str]) -> str:
    """The ending of a set's label files: ".cls", ".json", or "" if there are none."""
    sides = {ending(key): key for keys in samples for key in keys}
    folders = {files.inside(key).rpartition("/")[0] for keys in samples for key in keys}
    if ".cls" in sides:
        return ".cls"
    if ".json" not in sides or len(folders) > 1:
        return ""  # folders come first: JSON beside their images may mean anything
    return ".json" if _of_side(files, sides[".json"], notes) is not None else ""


def _of_side(files: Files, key: str, notes: list[str]) -> Any:
    """The label in a file beside an image."""
    text = files.read(key).decode("utf-8", "replace").strip()
    try:
        if ending(key) == ".cls":
            return int(text)
        table = json.loads(text)
        return table.get(label_name(list(table), notes)) if isinstance(table, dict) else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{files.location(key)} is no label ({one_line(error)})") from error


def _of_tables(files: Files, images: Sequence[str], notes: list[str]) -> Labels | None:
    """Labels of dataset.json (edm2, REPA), metadata.csv and metadata.jsonl (`datasets`)."""
    known: dict[str, Any] = {}
    names: list[str] = []
    used = ""
    for key in (e.key for e in files.entries if basename(e.key) in TABLES):
        place = files.location(key)
        table = _read_table(files, key, place)
        if key.endswith(".json"):
            table = table if isinstance(table, dict) else {"labels": table}
            rows, names = _rows(table, place)
        else:
            rows = _columns(table, key, notes)
        if rows is None:
            notes.append(f"{place} names no labels and is left alone")
            continue
        used = place
        base = key[: key.rfind("/") + 1]
        for path, value in rows:
            path = normalize("NFC", str(path).replace("\\", "/").removeprefix("./"))
            path = path if path.startswith(base) else base + path
            if known.setdefault(path, value) != value:
                raise DataError(f"{place} gives {path} two labels: {known[path]} and {value}")
    if not used or not known:  # none that names labels, or "labels": null
        return Labels((), [0] * len(images)) if used else None
    keys = [normalize("NFC", image) for image in images]
    if missing := [key for key in keys if known.get(key) is None]:
        raise DataError(f"{used} has no label for {missing[0]}")
    return classes([known[key] for key in keys], source=used, names=names)


def _read_table(files: Files, key: str, place: str) -> Any:
    try:
        text = files.read(key).decode("utf-8-sig")
        if key.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        if key.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError, OSError, csv.Error) as error:
        kind = ending(key)[1:].upper()
        raise DataError(f"{place} is not readable as {kind} ({one_line(error)})") from error


def _rows(table: dict[str, Any], place: str) -> tuple[list[Any] | None, list[str]]:
    """(path, label) of every image in a dataset.json, None if it lists none; and class names."""
    rows, names = table.get("labels"), table.get("class_names") or []
    if not isinstance(names, list):
        raise DataError(f'{place}: "class_names" is no list of names, in the order of the labels')
    try:
        pairs = [(a, b) for a, b in (rows.items() if isinstance(rows, dict) else rows or ())]
    except (TypeError, ValueError):
        raise DataError(f'{place}: "labels" is no list of [path, class number]') from None
    if rows is not None and not pairs:
        raise DataError(f'{place}: "labels" is empty; null means that there are no classes')
    return (pairs if "labels" in table else None), [str(name) for name in names]


def _columns(table: Any, key: str, notes: list[str]) -> list[Any] | None:
    """(path, label) of every image in a metadata table; None without a column of labels."""
    rows = [row for row in table if isinstance(row, dict)]
    label = label_name(list(rows[0]), notes) if rows else None
    if label is None or "file_name" not in rows[0]:
        return None
    values = [row.get(label) for row in rows]
    if key.endswith(".csv") and all(str(value).isdecimal() for value in values):
        values = [int(value) for value in values if value is not None]
    return list(zip([row.get("file_name") for row in rows], values, strict=True))


def _of_folders(files: Files, images: Sequence[str], rule: str) -> Labels | None:
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
    if loose := sum(not parts for parts in parents):
        raise DataError(
            f"{files.root} holds {loose} images beside class folders: move them into one, "
            "or take all without labels with --classes none"
        )
    if rule == "leaf":
        return classes(["/".join(parts) for parts in parents], source=str(files.root))
    labels = classes(_outermost(parents), source=str(files.root))
    return None if rule == "auto" and len(labels.names) == 1 else labels  # a flat set in a folder


def _outermost(parents: Sequence[list[str]]) -> list[str]:
    """The outermost folder with siblings of each image. A wrapper such as data/ has none."""
    depth = 0
    while all(len(p) > depth + 1 for p in parents) and len({p[depth] for p in parents}) == 1:
        depth += 1
    return [parts[depth] for parts in parents]
