"""Where images come from: folders, archives, tables, the built-in set; each in one fixed order."""

import zipfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from erw.data.images import EXTENSIONS, WHITE
from erw.data.sources.base import Source, ending, overview, where
from erw.data.sources.folder import FileSource, Folder, Zip
from erw.data.sources.labels import CLASSES, SPLITS
from erw.errors import DataError

__all__ = ["BUILT_IN", "HUB", "FileSource", "Folder", "Source", "open_source", "overview", "where"]

BUILT_IN = ("openmoji", "openmoji-test")
HUB = "hf:"
_SHARDS = (".tar", ".parquet", ".arrow")
_ARRAYS = (".npy", ".npz")


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
    name, paths = _files(str(images), split=split, subset=subset)
    source = _open(paths, classes=classes, background=background, columns=columns)
    if name:
        source.name = name
    return source


def _files(images: str, *, split: str | None, subset: str | None) -> tuple[str, list[Path]]:
    """The name of a set with splits, or "", and the files, or the one folder, to read."""
    path = Path(images).expanduser()
    if images.startswith(HUB):
        from erw.data.sources.hub import files_of

        return files_of(images.removeprefix(HUB), split=split, subset=subset)
    paths = [path] if path.exists() else [Path(match) for match in sorted(glob(str(path)))]
    if not paths:
        raise FileNotFoundError(
            f"no image folder or archive at {path} (built-in sets: {', '.join(BUILT_IN)})"
        )
    if not path.is_dir():
        if split or subset:
            raise DataError(f"{path} is no folder, so it has no split or subset")
        return "", paths
    if split and not subset:  # train/ and test/ with folders of classes in them
        folders = [p for p in path.iterdir() if p.is_dir() and SPLITS.get(p.name.lower())]
        chosen = [p for p in folders if SPLITS[p.name.lower()] == SPLITS.get(split, split)]
        if len(chosen) == 1 and not _shards(chosen[0]):
            return f"{path.name}:{split}", chosen
    if split or subset or _shards(path):
        from erw.data.sources.hub import files_of

        name, paths = files_of(images, split=split, subset=subset)
        return (name if split or subset else ""), paths
    return "", [path]


def _shards(folder: Path) -> bool:
    """Whether a folder holds shards of a set instead of loose images."""
    kinds = [(ending(entry.key), entry.key) for entry in Folder(folder).entries]
    shards = [(kind, key) for kind, key in kinds if kind in _SHARDS]
    loose = sum(kind in EXTENSIONS for kind, _ in kinds)
    if not shards:
        return False
    endings = sorted({kind for kind, _ in shards})
    pattern = f"a pattern such as '{folder / ('*' + endings[0])}'"
    if loose:
        raise DataError(
            f"{folder} holds {loose} images and {len(shards)} packed files (such as "
            f"{shards[0][1]}): move one kind away, or name the packed ones by {pattern}"
        )
    if len(endings) > 1:
        raise DataError(f"{folder} holds {' and '.join(endings)} files: name one kind by {pattern}")
    return True


def _open(
    paths: list[Path], *, classes: str, background: tuple[int, int, int], columns: Sequence[str]
) -> Any:
    """The source in files of one kind, or in one folder."""
    first = paths[0]
    kinds = {"" if path.is_dir() else path.suffix.lower() for path in paths}
    kind = kinds.pop()
    if kinds or (len(paths) > 1 and kind not in _SHARDS):
        raise DataError(f"{first} and {len(paths) - 1} more are no shards of one kind")
    labelled = classes != "none"
    if kind in (".parquet", ".arrow"):
        from erw.data.sources.parquet import Table

        return Table(paths, labelled=labelled, background=background, columns=columns)
    if columns:
        raise DataError(f"{first} is no table, so it has no columns {', '.join(columns)}")
    if kind in _ARRAYS:
        from erw.data.sources.numpy import Arrays

        return Arrays(first, labelled=labelled)
    if kind == ".tar":
        from erw.data.sources.webdataset import Tars

        source = FileSource(Tars(sorted(paths)), classes=classes, background=background)
        source.name = first.parent.name if len(paths) > 1 else first.name
        return source
    if first.is_dir():
        return FileSource(Folder(first), classes=classes, background=background)
    if zipfile.is_zipfile(first):
        return FileSource(Zip(first), classes=classes, background=background)
    raise DataError(
        f"{first} is neither a folder nor a zip archive of images, nor one of "
        f"{', '.join((*_SHARDS, *_ARRAYS))}"
    )
