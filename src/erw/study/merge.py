"""Studies of the same settings with different seeds, as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erw.errors import DataError
from erw.study.results import Results, read_results


def merge(folders: Sequence[Path], *, base: Path) -> Results:
    """One study of all seeds of the studies in `folders`; pictures are named relative to `base`.

    Ledger, floors and pictures of no method are the first one's: they do not depend on the seed.
    Raises DataError if the studies differ in anything but seeds, or two have a seed in common.
    """
    parts = [_based(read_results(folder), folder, base) for folder in folders]
    first = parts[0]
    if len(parts) == 1:
        return first
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        if _without_seeds(part) != _without_seeds(first):
            raise DataError(
                f"{folder} is a study of other settings than {folders[0]}; report on it alone"
            )
    rows = tuple(row for part in parts for row in part.rows)
    runs = [(row.method, row.seed, row.step) for row in rows]
    if len(set(runs)) < len(runs):
        raise DataError(f"two of {', '.join(map(str, folders))} have a seed in common")
    methods = first.methods
    rows = tuple(sorted(rows, key=lambda row: (methods.index(row.method), row.seed, row.step)))
    study = dict(first.settings["study"])
    study["seeds"] = sorted({row.seed for row in rows})
    curves = {key: curve for part in parts for key, curve in part.curves.items()}
    return replace(first, rows=rows, curves=curves, settings={**first.settings, "study": study})


def _based(results: Results, folder: Path, base: Path) -> Results:
    """The same results with pictures relative to `base`."""
    folder = folder.parent if folder.is_file() else folder

    def moved(picture: str | None) -> str | None:
        return picture and os.path.relpath(folder / picture, base)

    rows = tuple(row._replace(picture=moved(row.picture)) for row in results.rows)
    pictures = {name: moved(path) or "" for name, path in results.pictures.items()}
    return replace(results, rows=rows, pictures=pictures)


def _without_seeds(results: Results) -> dict[str, Any]:
    """The settings less seeds and the cache's place, which is in each study's own folder."""
    study = {k: v for k, v in results.settings["study"].items() if k != "seeds"}
    methods = {
        name: run | {"seed": None, "data": run["data"] | {"cache": None}}
        for name, run in results.settings["methods"].items()
    }
    return {"study": study, "methods": methods}
