"""Which class an image belongs to: every rule by which labels are found, in one place."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from posixpath import basename, dirname, splitext
from typing import Any
from unicodedata import normalize

import numpy as np

from erw.data.images import EXTENSIONS
from erw.errors import DataError, raised_as

Labels = tuple[tuple[str, ...], np.ndarray]  # names of classes; each image's number, int32 (N,)

CLASSES = ("auto", "folders", "leaf", "none")
TABLES = ("dataset.json", "metadata.csv", "metadata.jsonl")
# Names that mean a label, the likeliest first.
USUAL = ("label", "labels", "fine_label", "cls")
_OTHERS = "class class_id class_label category category_id target targets y coarse_label arr_1"
MOST_CLASSES = 1_000_000  # numbers above are of something else: an index, a time, a hash
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SPLIT = re.compile(f"(?:^|(?<=/))({'|'.join(SPLITS)})/", re.IGNORECASE)
_TABLE = re.compile(r"\.([ct]sv|jsonl)$|(label|class|annot|target)[^/]*\.(json|txt|npy)$", re.I)
_NUMBER = re.compile(r" *[+-]?\d+ *")
_SYSTEM = (  # in small letters
    *(".", "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "#snapshot"),
    *("lost+found", "system volume information"),
)


@dataclass
class Files:
    """Named files: below a folder, or inside archives. Reading from several threads is safe."""

    root: Path
    name: str
    entries: dict[str, str]  # path inside -> size and checksum; becomes sorted, without hidden ones
    read: Callable[[str], bytes]
    location: Callable[[str], str]  # the place of a file, for messages
    inside: Callable[[str], str] = str  # the path whose folders may name the class

    def __post_init__(self) -> None:
        self.entries = {k: self.entries[k] for k in sorted(self.entries) if not hidden(k)}


def label_name(names: Sequence[str], marked: Sequence[str] = ()) -> str | None:
    """Which name means the label: a usual one, the one `marked` as such, or the only likely one."""
    usual = [name for name in USUAL if name in names]
    if not usual and len(marked) > 1:
        raise DataError(f"several ClassLabel columns ({', '.join(marked)}): name one by --columns")
    likely = [name for name in _OTHERS.split() if name in names]
    return (*usual, *marked, *likely[: len(likely) == 1], None)[0]


def classes(values: Sequence[Any], *, source: str, names: Sequence[str] = ()) -> Labels:
    """Labels from one value an image: all numbers, all names (`DataError` for a mix), or all None.

    `names` are the classes' names in order, where a file lists them, with the number if two classes
    have one name (ImageNet's two cranes); otherwise numbers are names.
    """
    if not values:
        raise DataError(f"{source} holds no images")
    values = [
        normalize("NFC", value) if isinstance(value, str) else value for value in map(given, values)
    ]
    bare = values.count(None)
    if bare == len(values):
        return (), np.zeros(bare, np.int32)
    class_names = tuple(normalize("NFC", name) for name in names)
    often = Counter(class_names)
    class_names = tuple(
        f"{name} #{n}" * (often[name] > 1) or name for n, name in enumerate(class_names)
    )
    kinds = {type(value) for value in values}
    if kinds == {int} and (most := max(values)) >= MOST_CLASSES:
        hint = "number classes from 0, or give --classes none"
        raise DataError(f"{source}: label {most:,} is of no {MOST_CLASSES:,} classes: {hint}")
    if not class_names and kinds in ({str}, {int}):
        class_names = tuple(
            sorted(set(values)) if kinds == {str} else map(str, range(max(values) + 1))
        )
    keys: Iterable[Any] = class_names if kinds == {str} else range(len(class_names))
    numbers = {key: number for number, key in enumerate(keys)}
    wrong = [v for v in values if type(v) not in (int, str) or v not in numbers]
    if wrong:
        problem = f"label {wrong[0]!r}, expected a class number from 0, or a name"
        problem = f"{bare} of {len(values)} images have no label" if bare else problem
        problem += f", one of {listed(class_names)}" if names else ""
        raise DataError(f"{source}: {problem}; give all a number or all a name, or --classes none")
    return class_names, np.array([numbers[value] for value in values], np.int32)


def find(files: Files, rule: str) -> tuple[list[str], Labels, list[str]]:
    """The images among some files, sorted; their labels by one of the rules `CLASSES`; and notes on
    what looks like labels and is not used.

    "auto" takes the first of dataset.json, label files of a WebDataset, and folders.
    """
    images = [key for key in files.entries if ending(key) in EXTENSIONS]
    notes = list[str]()
    sides = _samples(files, images, notes if rule == "auto" else [])
    images = list(sides) or images
    used = {*images, *sides.values()}
    rest = [key for key in files.entries if key not in used and basename(key) not in TABLES]
    if rest:
        kinds = Counter(ending(key) or "no ending" for key in rest).most_common(3)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds)
        notes.append(f"{len(rest)} other files are left alone ({counted})")
    if not images:
        problem = notes[0] if notes else "expected images, or folders of images"
        raise DataError(f"no images in {files.root}: {problem}; Pillow's image formats are read")
    values, names = _of_tables(files, images, notes) if rule == "auto" else (None, [])
    if values is None and sides and rule == "auto":
        values = [side and _label(files, side) for side in sides.values()]
    if values is None and rule != "none":
        values = _of_folders(files, images, rule)
    folders = {f"{dirname(files.inside(key))}/" for key in images}
    splits = sorted(set(map(_split, folders)) - {""})
    if len(splits) > 1:
        joined = f"{' and '.join(splits)} look like splits and are read as one set"
        notes.append(f"{joined}: take one with --split")
    tables = [key for key in rest if _TABLE.search(key)] if rule == "auto" and not values else []
    if 0 < len(tables) < 4:  # more are not of the whole set
        hint = "labels are read from metadata.csv with columns file_name and label"
        notes.append(f"{listed(tables)} might hold labels and is not used: {hint}")
    values = values or [None] * len(images)
    return images, classes(values, source=str(files.root), names=names), notes


def of_split(files: Files, name: str) -> Files:
    """The files in folders that are named as a split, and tables of labels outside of all splits.
    Raises `DataError` for no such folder, or two names that mean it."""
    splits = {key: _split(files.inside(key)) for key in files.entries}
    folders = sorted({*splits.values()} - {""})
    chosen = [x for x in folders if SPLITS[x] == SPLITS.get(name)]
    if len(chosen := [name] if name in folders else chosen) != 1:
        raise DataError(
            f"{files.root} has no split {name}, its folders: {', '.join(folders) or '-'}"
        )
    outside = {key for key in files.entries if not splits[key] and basename(key) in TABLES}
    kept = {k: x for k, x in files.entries.items() if splits[k] == chosen[0] or k in outside}
    inside = lambda key: _SPLIT.sub("", files.inside(key), count=1)  # noqa: E731 - it is no class
    return replace(files, name=f"{files.name}:{name}", entries=kept, inside=inside)


def _split(path: str) -> str:
    """The outermost folder that is named as splits are, in small letters; "" without one."""
    return next(iter(_SPLIT.findall(path)), "").lower()


def _samples(files: Files, images: Sequence[str], notes: list[str]) -> dict[str, str | None]:
    """The images of a WebDataset, each with its label file; {} if no image has one.

    Labels are NAME.cls, or NAME.json with a label in it where the images lie in no class folders.
    An unlabelled image beside a labelled one of its sample (0.depth.png, 0.png) is left alone.
    """

    def sample(key: str) -> str:
        return f"{dirname(key)}/{basename(key).partition('.')[0]}"

    samples = set(map(sample, images))
    last = {ending(key): key for key in files.entries if sample(key) in samples}
    flat = len({dirname(files.inside(key)) for key in images}) == 1
    kind = ".cls" if ".cls" in last else ".json" if flat and ".json" in last else ""
    if kind == ".json" and _label(files, key := last[kind]) is None:
        notes.append(_unused(files.location(key), _parsed(files, key)))
        kind = ""
    if not kind:
        return {}
    sides = {splitext(key)[0]: key for key in files.entries if ending(key) == kind}
    groups = [Counter(map(sample, keys)) for keys in (images, sides.values())]
    by_sample = {sample(key): key for key in sides.values()}
    pairs = {image: sides.get(splitext(image)[0]) for image in images}
    for image in images:  # 0.input.png and 0.output.cls are a pair too
        if pairs[image] is None and all(group[sample(image)] == 1 for group in groups):
            pairs[image] = by_sample[sample(image)]
    labelled = {sample(image) for image, side in pairs.items() if side}
    return {image: side for image, side in pairs.items() if side or sample(image) not in labelled}


def _parsed(files: Files, key: str) -> Any:
    """What a file with labels holds: a number in .cls, a table in .csv and .jsonl, else JSON."""
    kind = ending(key)[1:].upper()
    with raised_as(DataError, f"{files.location(key)} is not readable as {kind}"):
        text = files.read(key).decode("utf-8-sig")
        if kind not in ("CSV", "JSONL"):
            return int(text) if kind == "CLS" else json.loads(text)
        if kind == "CSV":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        label = label_name(list(rows[0])) if rows else None
        if not label or "file_name" not in rows[0]:
            return dict(rows[0]) if rows else {}
        values = [given(row.get(label)) for row in rows]
        if kind == "CSV" and all(value is None or _NUMBER.fullmatch(value) for value in values):
            values = [value and int(value) for value in values]
        return {"labels": list(zip([row["file_name"] for row in rows], values, strict=True))}


def _unused(place: str, table: Any) -> str:
    """A note on a file that might hold labels, with what it has, and what they would be."""
    names = list(table) if isinstance(table, dict) else []
    expected = "columns file_name and label" if place.endswith(TABLES[1:]) else f'"{USUAL[1]}"'
    more = f": it has {listed(names)}, expected {expected}" if names else ""
    return f"{place} names no labels and is left alone{more}"


def _label(files: Files, key: str) -> Any:
    """The label in a file beside an image."""
    value = _parsed(files, key)
    return value.get(label_name(list(value))) if isinstance(value, dict) else value


def _of_tables(
    files: Files, images: Sequence[str], notes: list[str]
) -> tuple[list[Any] | None, list[str]]:
    """Values and class names of dataset.json (edm2, REPA), metadata.csv and .jsonl (`datasets`)."""
    labels, names, used = dict[str, Any](), list[str](), ""
    for key in (key for key in files.entries if basename(key) in TABLES):
        place, table = files.location(key), _parsed(files, key)
        if not isinstance(table, dict) or "labels" not in table:
            notes.append(_unused(place, table))
            continue
        used, base, rows = place, key.removesuffix(basename(key)), table["labels"]
        with raised_as(DataError, f'{place}: expected "labels": null or a list of [path, label]'):
            if rows in ([], {}):
                raise ValueError("none")
            rows = rows.items() if isinstance(rows, dict) else rows or ()
            pairs = [(str(path), given(value)) for path, value in rows]
            names = list(map(str, table.get("class_names") or ()))
        for path, value in pairs:
            path = normalize("NFC", path.replace("\\", "/").removeprefix("./"))
            path = path if path.startswith(base) else base + path
            if labels.setdefault(path, value) != value:
                raise DataError(f"{place} gives {path} two labels: {labels[path]} and {value}")
    if not labels:  # no table that names labels, or "labels": null
        return [None] * len(images) if used else None, []
    names_here = [normalize("NFC", image) for image in images]
    values = [labels.get(image) for image in names_here]
    if gone := sorted(labels.keys() - set(names_here)):
        notes.append(f"{len(gone)} labels of {used} are of no image here ({listed(gone)})")
    if missing := [image for image, value in zip(images, values, strict=True) if value is None]:
        problem = f"{used} has no label for {listed(missing)} ({len(missing)} of {len(images)})"
        raise DataError(f"{problem}: fill them in, or take all without with --classes none")
    return values, names


def _of_folders(files: Files, images: Sequence[str], rule: str) -> list[str] | None:
    """Classes named by folders; None without any."""
    paths = [files.inside(key) for key in images]
    if not any("/" in path for path in paths) and any(".tar/" in key for key in images):
        if rule == "auto":
            hint = "give --classes folders to make each archive a class, or --classes none for none"
            raise DataError(f"archives such as {files.root} hold no labels or folders: {hint}")
        paths = [key.replace(".tar/", "/") for key in images]
    parents = [path.split("/")[:-1] for path in paths]
    if not any(parents):
        return None
    if loose := parents.count([]):
        hint = "move them into one, or take all without labels with --classes none"
        raise DataError(f"{files.root} holds {loose} images beside class folders: {hint}")
    if rule == "leaf":
        return ["/".join(parts) for parts in parents]
    depth = 0  # of the outermost folders with siblings: a wrapper such as data/ has none
    while all(len(p) > depth + 1 for p in parents) and len({p[depth] for p in parents}) == 1:
        depth += 1
    values = [parts[depth] for parts in parents]
    return None if rule == "auto" and len(set(values)) == 1 else values  # a flat set in a folder


def given(value: Any) -> Any:
    """A label as a file has it; None for an empty cell, which is no class of that name."""
    return None if isinstance(value, str) and not value.strip() else value


def hidden(key: str) -> bool:
    """True for what no person put there: .git, ._x.jpg, __MACOSX, the folders of a NAS."""
    return any(part.startswith(_SYSTEM) for part in key.lower().split("/"))


def ending(key: str) -> str:
    """The last ending of a path in small letters, with its dot: ".jpg"; "" without one."""
    return splitext(key)[1].lower()


def listed(items: Sequence[Any]) -> str:
    """The first few items, with commas."""
    return ", ".join(map(str, items[:4])) + (", ..." if len(items) > 4 else "")
