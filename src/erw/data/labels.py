"""Which class an image belongs to, as its folder, a table or a file beside it tells."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from erw.errors import DataError


def labels_of_paths(root: Path, keys: list[str], classes: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels from folders; class names sorted by code point."""
    parents = [PurePosixPath(key).parent.parts for key in keys]
    if classes == "none" or not any(parents):
        return [0] * len(keys), ()
    loose = sum(not parts for parts in parents)
    if loose:
        raise DataError(
            f"{root} holds {loose} images beside class folders: move them into one, "
            'or take all as one class with classes="none"'
        )
    if classes == "leaf":
        folders = ["/".join(parts) for parts in parents]
    else:
        depth = 0  # a wrapper such as train/ is no class: go down while there is one way only
        while all(len(p) > depth + 1 for p in parents) and len({p[depth] for p in parents}) == 1:
            depth += 1
        folders = [parts[depth] for parts in parents]
    names = tuple(sorted(set(folders)))
    number = {name: label for label, name in enumerate(names)}
    return [number[folder] for folder in folders], names


def read_table(files: Any, key: str) -> dict[str, Any]:
    """A dataset.json as a dictionary; `DataError` if it is not JSON."""
    try:
        table = json.loads(files.read(key))
        return table if isinstance(table, dict) else {"labels": table}
    except (ValueError, OSError) as error:
        raise DataError(f"{files.where(key)} is not readable as JSON ({error})") from error


def labels_of_table(
    shown: str, key: str, table: dict[str, Any], keys: list[str]
) -> tuple[list[int], tuple[str, ...]]:
    """Labels of edm2's table: {"labels": [[path, class number], ...] or {path: number} or null}."""
    rows = table.get("labels")
    if rows is None:
        return [0] * len(keys), ()
    try:
        known = {str(path).replace("\\", "/"): label for path, label in dict(rows).items()}
    except (TypeError, ValueError):
        raise DataError(f'{shown}: "labels" is no list of [path, class number]') from None
    base = key[: key.rfind("/") + 1]
    labels = []
    for image in keys:
        label = known.get(image.removeprefix(base), known.get(image))
        if label is None:
            raise DataError(f"{shown} has no label for {image}")
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise DataError(f"{shown}: label of {image} is {label!r}, expected a class number")
        labels.append(label)
    names = table.get("class_names") or [str(label) for label in range(max(labels) + 1)]
    if not isinstance(names, list):
        raise DataError(f'{shown}: "class_names" is no list of names, in the order of the labels')
    if max(labels) >= len(names):
        raise DataError(f"{shown}: label {max(labels)} but only {len(names)} class_names")
    return labels, tuple(str(name) for name in names)


def classes(told: Sequence[int | str | None], *, where: str) -> tuple[tuple[str, ...], list[int]]:
    """Class names and numbers from what was told of each image: all numbers, all names, or none.

    Raises `DataError` if some have a label and others not, or kinds are mixed.
    """
    kinds = {type(label) for label in told}
    if not told:
        raise DataError(f"{where} holds no images")
    if kinds == {type(None)}:
        return (), [0] * len(told)
    if kinds == {int}:
        numbers = [label for label in told if isinstance(label, int)]
        if min(numbers) < 0:
            raise DataError(
                f"{where}: label {min(numbers)}, expected class numbers from 0; give "
                "--classes none to leave labels out"
            )
        return tuple(str(number) for number in range(max(numbers) + 1)), numbers
    if kinds == {str}:
        names = tuple(sorted({str(label) for label in told}))
        number = {name: label for label, name in enumerate(names)}
        return names, [number[str(label)] for label in told]
    bare = sum(label is None for label in told)
    what = f"{bare} of {len(told)} images have no label" if bare else "labels mix numbers and names"
    raise DataError(f"{where}: {what}; give all the same kind, or none")
