"""Where images come from: folders, archives, tables, the built-in set; each in one fixed order."""

import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from blake3 import blake3

from erw.data.files import Entry, Files, Folder, Zip, named_bytes
from erw.data.images import EXTENSIONS, WHITE, Unreadable, decode
from erw.data.labels import labels_of_paths, labels_of_table, read_table
from erw.errors import DataError

CLASSES = ("auto", "folders", "leaf", "none")
BUILT_IN = ("openmoji", "openmoji-test")
HUB = "hf:"
PACKED = (".tar", ".parquet", ".arrow", ".npy", ".npz")


@runtime_checkable
class Source(Protocol):
    """A fixed list of labelled images.

    `class_names` is empty when there are no classes; every label is then 0. `source[i]` is
    (uint8 (H, W, 3), label) and raises `Unreadable` for a bad image. `fingerprint()` changes when
    the list, the labels or the sizes of the files do. A source that knows where image i lies also
    has `where(i) -> str`.
    """

    name: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, int]: ...

    def fingerprint(self) -> str: ...


class FileSource:
    """Image files with labels; see `open_source`. `ignored` counts other files by their ending."""

    def __init__(
        self,
        files: Files,
        *,
        classes: str = "auto",
        background: tuple[int, int, int] = WHITE,
    ) -> None:
        self.files, self.background = files, background
        self.name = files.root.resolve().name
        found = sorted(files.entries())
        images = [entry for entry in found if _ending(entry.key) in EXTENSIONS]
        self.ignored = Counter(
            _ending(entry.key) or "none"
            for entry in found
            if _ending(entry.key) not in EXTENSIONS and not _is_table(entry.key)
        )
        if not images:
            raise DataError(_nothing_in(files.root, found, self.ignored))
        tables = [entry.key for entry in found if _is_table(entry.key)]
        table = read_table(files, tables[0]) if tables and classes in ("auto",) else None
        keys = [entry.key for entry in images]
        if table is not None:
            labels, names = labels_of_table(files.where(tables[0]), tables[0], table, keys)
        else:
            told = [files.class_path(key) for key in keys] if classes != "none" else keys
            labels, names = labels_of_paths(files.root, told, classes)
        self.class_names = names
        self.keys = keys
        self._labels = np.asarray(labels, dtype=np.int32)
        self._fingerprint = _fingerprint(images, labels, names, background)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            data = self.files.read(self.keys[index])
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or error})") from error
        return decode(data, background=self.background), int(self._labels[index])

    def where(self, index: int) -> str:
        """The path of image `index`, to show to people."""
        return self.files.where(self.keys[index])

    def fingerprint(self) -> str:
        """Of paths, sizes (in zips: checksums), labels, class names and the background colour."""
        return self._fingerprint


def open_source(
    where: str | Path | Source,
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
        where: a folder, zip or tar of images; WebDataset shards (.tar), Parquet or Arrow files as
            Hugging Face `datasets` writes them, by file, folder or pattern ("data/train-*.tar");
            uint8 images in .npy or .npz; "hf:OWNER/NAME", a data set of the Hugging Face hub, at
            "@REVISION" if given; "openmoji" or "openmoji-test" (`options` go to `OpenMojiSet`), or
            a source, which is given back as it is.
        classes: "auto": labels of a `dataset.json` (edm2, REPA) if there is one, else as "folders";
            "folders": the outermost folder with siblings names the class, at any depth below
            it; a flat folder has none; "leaf": the folder that holds the image; "none".
        background: colour under transparent pixels.
        split, subset: which one of a data set of the hub, or of a folder in its layout.
        columns: names of the image and the label column of tables, where they are unusual.

    Raises `FileNotFoundError` if nothing is there, `DataError` if it holds no image.
    """
    if not isinstance(where, str | Path):
        return where
    if classes not in CLASSES:
        raise DataError(f"unknown classes={classes!r}: choose one of {', '.join(CLASSES)}")
    if str(where) in BUILT_IN:
        from erw.data.openmoji import OpenMojiSet

        return OpenMojiSet("test" if str(where).endswith("test") else "train", **options)
    if options:
        raise DataError(f"{where} is no built-in set, so it has no option {sorted(options)[0]!r}")
    how = {"classes": classes, "background": background}
    return _located(where, how, split=split, subset=subset, columns=columns)


def _located(
    where: str | Path,
    how: dict[str, Any],
    *,
    split: str | None,
    subset: str | None,
    columns: Sequence[str],
) -> Source:
    """The source in files, on this machine or the hub."""
    from erw.data.packed import packed

    if str(where).startswith(HUB) or ((split or subset) and Path(where).expanduser().is_dir()):
        from erw.data.hub import files_of

        name, paths = files_of(str(where).removeprefix(HUB), split=split, subset=subset)
        if found := packed(paths, columns=columns, **how):
            found.name = name
            return found
        raise DataError(f"{name} is not of one kind of {', '.join(PACKED[:3])} files")
    path = Path(where).expanduser()
    paths = [path] if path.exists() else [Path(found) for found in sorted(glob(str(path)))]
    if not paths:
        raise FileNotFoundError(
            f"no image folder or archive at {path} (built-in sets: {', '.join(BUILT_IN)})"
        )
    if split or subset:
        raise DataError(f"{path} is no folder, so it has no split or subset")
    if found := packed(paths, columns=columns, **how):
        return found
    if len(paths) > 1:
        raise DataError(f"{path} names {len(paths)} things that are no shards of one kind")
    if columns:
        raise DataError(f"{path} is no table, so it has no columns {', '.join(columns)}")
    if path.is_dir():
        return FileSource(Folder(path), **how)
    if zipfile.is_zipfile(path):
        return FileSource(Zip(path), **how)
    raise DataError(
        f"{path} is neither a folder nor a zip archive of images, nor one of {', '.join(PACKED)}"
    )


def where(source: Source, index: int) -> str:
    """Where image `index` lies, for messages: its path, or name and number."""
    return source.where(index) if hasattr(source, "where") else f"{source.name}[{index}]"


def _ending(key: str) -> str:
    return PurePosixPath(key).suffix.lower()


def _is_table(key: str) -> bool:
    return PurePosixPath(key).name == "dataset.json" and key.count("/") <= 1


def _nothing_in(root: Path, found: list[Entry], ignored: Counter[str]) -> str:
    if not found:
        return f"{root} is empty: expected images, or folders of images"
    kinds = _counted(ignored)
    return f"no images in {root}, only other files ({kinds}); Pillow's image formats are read"


def left_alone(source: Source) -> str:
    """A line about files of no known format and empty folders beside the images, or nothing."""
    lines = []
    if ignored := getattr(source, "ignored", None):
        lines.append(f"{ignored.total()} other files are left alone ({_counted(ignored)})")
    if empty := getattr(getattr(source, "files", None), "empty", None):
        lines.append(f"{len(empty)} empty folders are no classes (such as {min(empty)})")
    return "; ".join(lines)


def _counted(ignored: Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in ignored.most_common(3))


def _fingerprint(
    images: list[Entry], labels: list[int], names: tuple[str, ...], background: tuple[int, ...]
) -> str:
    digest = blake3(json.dumps([names, background]).encode())
    for entry, label in zip(images, labels, strict=True):
        digest.update(named_bytes(f"{entry.key}\0{entry.size}\0{entry.stamp}\0{label}\n"))
    return digest.hexdigest()[:32]
