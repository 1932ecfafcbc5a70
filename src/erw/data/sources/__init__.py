"""Where images come from: folders, archives, tables, the built-in set; each in one fixed order."""

import zipfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from erw.data import BUILT_IN
from erw.data.images import EXTENSIONS
from erw.data.sources.files import FileSource, Source, folder, overview, tars, zipped
from erw.data.sources.hub import PACKED, files_of, one_set
from erw.data.sources.labels import CLASSES, Files, ending, of_split
from erw.data.sources.openmoji import OpenMojiSet
from erw.data.sources.tables import Arrays, Table
from erw.errors import DataError

__all__ = ["BUILT_IN", "HUB", "FileSource", "Source", "located", "open_source", "overview"]

HUB = "hf:"


def open_source(
    images: str | Path | Source, *, classes: str = "auto", split: str | None = None,
    subset: str | None = None, columns: Sequence[str] = (), **options: Any,
) -> Source:  # fmt: skip
    """A source from a folder, an archive, a table, the hub, or the name of the built-in set.

    Args:
        images: a folder, zip or tar of images; WebDataset shards (.tar), Parquet or Arrow files of
            Hugging Face `datasets`, by file, folder or pattern ("data/train-*.tar"); uint8 images
            in .npy or .npz; "hf:OWNER/NAME[@REVISION]" on the hub; "openmoji" or "openmoji-test"
            (`options` go to `OpenMojiSet`); or a source, which is returned as it is.
        classes: "auto": labels of a `dataset.json` (edm2, REPA) or WebDataset if there are any,
            else as "folders": the outermost folder with siblings names the class, at any depth
            below it; "leaf": the folder that holds the image; "none".
        split, subset: which one of several in folders or files of these names, or on the hub.
        columns: names of the image and the label column of tables, where they are unusual.

    Raises FileNotFoundError, or `DataError` for no images and labels that contradict each other.
    """
    if not isinstance(images, str | Path):
        return images
    if classes not in CLASSES:
        raise DataError(f"unknown classes={classes!r}: choose one of {', '.join(CLASSES)}")
    if str(images) in BUILT_IN:
        return OpenMojiSet("test" if str(images).endswith("test") else "train", **options)
    if options:
        raise DataError(f"{images} is no built-in set, so it has no option {sorted(options)[0]!r}")
    path, name = Path(images).expanduser(), ""
    paths, files, inside = [path], None, split
    if str(images).startswith(HUB):
        name, paths = files_of(str(images).removeprefix(HUB), split=split, subset=subset)
        inside = subset = None
    elif path.is_dir():
        files = folder(path)
        packed = [key for key in files.entries if ending(key) in PACKED]
        kinds = sorted({ending(key) for key in packed})
        kinds += ["image"] * any(ending(key) in EXTENSIONS for key in files.entries)
        if len(kinds) > 1:
            problem = f"{path} holds {' and '.join(kinds)} files"
            raise DataError(f"{problem}: name one kind by a pattern, as '{path}/*'")
        if packed:
            part, chosen = one_set(packed, path, split, subset)
            name = path.name + f":{part}" * bool(split or subset)
            paths, files, inside, subset = [path / key for key in chosen], None, None, None
    else:
        paths = located(images)
    if subset or (inside and not files and ending(paths[0].name) in (*PACKED[1:], ".npy", ".npz")):
        raise DataError(f"{path} has no splits or subsets inside: name the files of one")
    source = _open(sorted(paths), files, classes, columns, inside)
    source.name = name or source.name
    return source


def located(images: str | Path) -> list[Path]:
    """The path of images on this machine, or those that match it as a pattern; [] for what is on
    none: a built-in set, or one of the hub. Raises FileNotFoundError for no path."""
    path = Path(images).expanduser()
    if str(images) in BUILT_IN or str(images).startswith(HUB):
        return []
    paths = [path] if path.exists() else [Path(match) for match in sorted(glob(str(path)))]
    if not paths:
        raise FileNotFoundError(f"no images at {path} (built-in sets: {', '.join(BUILT_IN)})")
    return paths


def _open(
    paths: list[Path], files: Files | None, classes: str, columns: Sequence[str], split: str | None
) -> Source:
    """The source in a folder's files, or in paths of one kind."""
    kinds = {"" if files else ending(path.name) for path in paths}
    if kinds <= {".parquet"} or kinds <= {".arrow"}:
        return Table(paths, labelled=classes != "none", columns=columns)
    if columns:
        raise DataError(f"{paths[0]} is no table, so it has no columns {', '.join(columns)}")
    if len(paths) == 1 and kinds <= {".npy", ".npz"}:
        return Arrays(paths[0], labelled=classes != "none")
    if kinds == {".tar"}:
        files = tars(paths)
    elif not files and len(paths) == 1 and zipfile.is_zipfile(paths[0]):
        files = zipped(paths[0])
    if not files:
        choices = ", ".join(PACKED)
        raise DataError(f"{paths[0]} is neither a folder nor a zip, .npy, .npz, {choices}")
    return FileSource(of_split(files, split.lower()) if split else files, classes=classes)
