"""Where images come from: folders, archives, tables, the built-in set; each in one fixed order."""

import zipfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from erw.data.images import WHITE
from erw.data.sources.base import LabelledImages, Source, location, overview
from erw.data.sources.folder import FileSource, Folder, Zip
from erw.data.sources.hub import PACKED, files_of, has_shards
from erw.data.sources.labels import CLASSES, SPLITS
from erw.errors import DataError

__all__ = [
    "BUILT_IN",
    "HUB",
    "FileSource",
    "Folder",
    "Source",
    "location",
    "open_source",
    "overview",
]

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
    path = Path(images).expanduser()
    name, chosen = "", bool(split or subset)
    files: Folder | list[Path]
    if str(images).startswith(HUB):
        name, files = files_of(str(images).removeprefix(HUB), split=split, subset=subset)
    elif path.is_dir():
        files = Folder(_split_folder(path, split, subset) or path)
        name = f"{path.name}:{split}" if files.root != path else ""
        if has_shards(files) or (chosen and not name):
            name, files = files_of(str(files.root), split=split, subset=subset)
            name = name if chosen else ""
    elif chosen:
        raise DataError(f"{path} is no folder, so it has no split or subset")
    else:
        files = [path] if path.exists() else [Path(p) for p in sorted(glob(str(path)))]
    if not files:
        raise FileNotFoundError(
            f"no image folder or archive at {path} (built-in sets: {', '.join(BUILT_IN)})"
        )
    source = _open(files, columns, classes=classes, background=background)
    source.name = name or source.name
    return source


def _split_folder(path: Path, split: str | None, subset: str | None) -> Path | None:
    """The folder of loose images that is the split: train/ beside test/."""
    if split is None or subset is not None:
        return None
    folders = [p for p in sorted(path.iterdir()) if p.is_dir()]
    same = [p for p in folders if SPLITS.get(p.name.lower()) == SPLITS.get(split, split)]
    return same[0] if len(same) == 1 and not has_shards(Folder(same[0])) else None


def _open(files: Folder | list[Path], columns: Sequence[str], **options: Any) -> LabelledImages:
    """The source in files of one kind, or in one folder."""
    paths = [files.root] if isinstance(files, Folder) else files
    first, labelled = paths[0], options["classes"] != "none"
    kinds = {"" if path.is_dir() else path.suffix.lower() for path in paths}
    kind = kinds.pop()
    if kinds or (len(paths) > 1 and kind not in PACKED):
        raise DataError(f"{first} and {len(paths) - 1} more are no shards of one kind")
    if kind in (".parquet", ".arrow"):
        from erw.data.sources.parquet import Table

        return Table(paths, labelled=labelled, background=options["background"], columns=columns)
    if columns:
        raise DataError(f"{first} is no table, so it has no columns {', '.join(columns)}")
    if kind in (".npy", ".npz"):
        from erw.data.sources.numpy import Arrays

        return Arrays(first, labelled=labelled)
    if kind == ".tar":
        from erw.data.sources.webdataset import Tars

        return FileSource(Tars(sorted(paths)), **options)
    if isinstance(files, Folder):
        return FileSource(files, **options)
    if zipfile.is_zipfile(first):
        return FileSource(Zip(first), **options)
    raise DataError(
        f"{first} is neither a folder nor a zip archive of images, nor one of "
        f"{', '.join(PACKED)}, .npy, .npz"
    )
