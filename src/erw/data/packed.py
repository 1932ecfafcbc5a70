"""Images in packed files: archives and tables, by file, pattern, folder or split."""

from collections.abc import Sequence
from pathlib import Path

from erw.data.files import hidden
from erw.data.hub import files_of
from erw.data.images import EXTENSIONS
from erw.data.sources import PACKED, FileSource, Source
from erw.errors import DataError

ENDINGS = EXTENSIONS | set(PACKED[:3])


def packed(
    paths: list[Path],
    *,
    classes: str,
    background: tuple[int, int, int],
    columns: Sequence[str] = (),
) -> Source | None:
    """The source in packed files: those named, or those in a folder without loose images."""
    if len(paths) == 1 and paths[0].is_dir():
        paths = _shards(paths[0])
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) != 1 or not kinds <= set(PACKED):
        return None
    kind, labelled = kinds.pop(), classes != "none"
    if columns and kind not in (".parquet", ".arrow"):
        raise DataError(f"{paths[0]} is no table, so it has no columns {', '.join(columns)}")
    if kind == ".tar":
        from erw.data.archives import Tars, WebDataset, is_webdataset

        tars = Tars(sorted(paths))
        if is_webdataset(tars):
            return WebDataset(tars, labelled=labelled, background=background)
        if len(paths) > 1 and classes == "auto" and tars.flat:
            raise DataError(
                f"{len(paths)} archives such as {paths[0]} hold images without labels or folders: "
                "give --classes folders to make each archive a class, or --classes none for none"
            )
        return FileSource(tars, classes=classes, background=background)
    if kind in (".npy", ".npz"):
        if len(paths) > 1:
            raise DataError(f"{paths[0]} and {len(paths) - 1} more: name one file of arrays")
        from erw.data.arrays import Arrays

        return Arrays(paths[0], labelled=labelled)
    from erw.data.tables import Table

    return Table(paths, labelled=labelled, background=background, columns=columns)


def _shards(folder: Path) -> list[Path]:
    """Packed files of one set below a folder, if it holds any."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in ENDINGS and not hidden(path.relative_to(folder).as_posix())
    ]
    found = [path for path in files if path.suffix.lower() in PACKED[:3]]
    if not found:
        return []
    pattern = f"a pattern such as '{folder / ('*' + found[0].suffix)}'"
    if len(found) < len(files):
        raise DataError(
            f"{folder} holds {len(files) - len(found)} images and {len(found)} packed files (such "
            f"as {found[0].relative_to(folder)}): move one kind away, or name the packed ones by "
            f"{pattern}"
        )
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        raise DataError(f"{folder} holds {' and '.join(kinds)} files: name one kind by {pattern}")
    return files_of(str(folder), split=None, subset=None)[1]
