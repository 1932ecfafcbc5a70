"""Where images come from: folders, archives, tables, the built-in set; each in one fixed order."""

import zipfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from erw.data.images import WHITE
from erw.data.sources.base import Source, overview
from erw.data.sources.files import Files, FileSource, Folder, Tars, Zip
from erw.data.sources.hub import PACKED, files_of, has_shards
from erw.data.sources.labels import CLASSES, SPLITS
from erw.errors import DataError

__all__ = ["BUILT_IN", "HUB", "FileSource", "Folder", "Source", "open_source", "overview"]

BUILT_IN = ("openmoji", "openmoji-test")
HUB = "hf:"


def open_source(
    images: str | Path | Source,
    *,
    classes: str = "auto",
    background: tuple[int, int, int] = WHITE,
    split: str | None = None,
    subset: str | None = None,
    columns: Sequence[str] = (),
    **options: Any,
) -> Source:
    """A source from a folder, an archive, a table, the hub, or the name of the built-in set.

    Args:
        images: a folder, zip or tar of images; WebDataset shards (.tar), Parquet or Arrow files as
            Hugging Face `datasets` writes them, by file, folder or pattern ("data/train-*.tar");
            uint8 images in .npy or .npz; "hf:OWNER/NAME", a data set of the Hugging Face hub, at
            "@REVISION" if given; "openmoji" or "openmoji-test" (`options` go to `OpenMojiSet`), or
            a source, which is returned as it is.
        classes: "auto": labels of a `dataset.json` (edm2, REPA), `metadata.csv` or WebDataset if
            there are any, else as "folders"; "folders": the outermost folder with siblings names
            the class, at any depth below it; a flat folder has none; "leaf": the folder that holds
            the image; "none".
        background: colour under transparent pixels.
        split, subset: which one of a data set of the hub, or of a folder in its layout.
        columns: names of the image and the label column of tables, where they are unusual.

    Raises:
        FileNotFoundError: nothing is there.
        DataError: no images, or labels that contradict each other.
    """
    if not isinstance(images, str | Path):
        return images
    if classes not in CLASSES:
        raise DataError(f"unknown classes={classes!r}: choose one of {', '.join(CLASSES)}")
    if str(images) in BUILT_IN:
        from erw.data.sources.openmoji import OpenMojiSet

        return OpenMojiSet("test" if str(images).endswith("test") else "train", **options)
    if options:
        raise DataError(f"{images} is no built-in set, so it has no option {sorted(options)[0]!r}")
    path, name, chosen = Path(images).expanduser(), "", bool(split or subset)
    files: Folder | list[Path] = [path]
    if not path.exists():
        files = [Path(found) for found in sorted(glob(str(path)))]
    if str(images).startswith(HUB):
        name, files = files_of(str(images).removeprefix(HUB), split=split, subset=subset)
    elif path.is_dir():
        files = (None if subset else _split_folder(path, split)) or Folder(path)
        name = f"{path.name}:{split}" if files.root != path else ""
        if has_shards(files) or (chosen and not name):
            name, files = files_of(str(path), split=split, subset=subset)
            name = name if chosen else ""
    elif chosen:
        raise DataError(f"{path} is no folder, so it has no split or subset")
    if not files:
        raise FileNotFoundError(
            f"no image folder or archive at {path} (built-in sets: {', '.join(BUILT_IN)})"
        )
    source = _open(files, classes, background, columns)
    source.name = name or source.name
    return source


def _split_folder(path: Path, split: str | None) -> Folder | None:
    """The folder of loose images that is the split: train/ beside test/."""
    wanted = SPLITS.get(split or "", split)
    same = [p for p in path.iterdir() if p.is_dir() and SPLITS.get(p.name.lower()) == wanted]
    if not split or len(same) != 1 or has_shards(folder := Folder(same[0])):
        return None
    return folder


def _open(
    files: Folder | list[Path],
    classes: str,
    background: tuple[int, int, int],
    columns: Sequence[str],
) -> Source:
    """The source in files of one kind, or in one folder."""
    first, *more = [files.root] if isinstance(files, Folder) else sorted(files)
    kinds = {"" if path.is_dir() else path.suffix.lower() for path in (first, *more)}
    kind, labelled = min(kinds), classes != "none"
    if len(kinds) > 1 or (more and kind not in PACKED):
        raise DataError(f"{first} and {len(more)} more are no shards of one kind")
    if kind in (".parquet", ".arrow"):
        from erw.data.sources.parquet import Table

        return Table([first, *more], labelled=labelled, background=background, columns=columns)
    if columns:
        raise DataError(f"{first} is no table, so it has no columns {', '.join(columns)}")
    if kind in (".npy", ".npz"):
        from erw.data.sources.numpy import Arrays

        return Arrays(first, labelled=labelled)
    opened: Files
    if isinstance(files, Folder):
        opened = files
    elif kind == ".tar":
        opened = Tars([first, *more])
    elif zipfile.is_zipfile(first):
        opened = Zip(first)
    else:
        raise DataError(
            f"{first} is neither a folder nor a zip archive of images, nor one of "
            f"{', '.join(PACKED)}, .npy, .npz"
        )
    return FileSource(opened, classes=classes, background=background)
