"""Images in packed files: archives and tables, by file, pattern, folder or split."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .hub import sets
from .images import EXTENSIONS
from .sources import PACKED, FileSource, Source

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
    kinds = {path.suffix for path in paths}
    if len(kinds) != 1 or not kinds <= set(PACKED):
        return None
    kind, labelled = kinds.pop(), classes != "none"
    if columns and kind not in (".parquet", ".arrow"):
        raise DataError(f"{paths[0]} is no table, so it has no columns {', '.join(columns)}")
    if kind == ".tar":
        from .archives import Tars, WebDataset, is_webdataset

        if len(paths) == 1 and not is_webdataset(tar := Tars(paths)):
            return FileSource(tar, classes=classes, background=background)
        return WebDataset(paths, labelled=labelled, background=background)
    from .tables import Arrays, Table

    if kind in (".npy", ".npz"):
        if len(paths) > 1:
            raise DataError(f"{paths[0]} and {len(paths) - 1} more: name one file of arrays")
        return Arrays(paths[0], labelled=labelled)
    return Table(paths, labelled=labelled, background=background, columns=columns)


def _shards(folder: Path) -> list[Path]:
    """Packed files of one set below a folder, if it holds any."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS]
    found = [path for path in files if path.suffix.lower() in PACKED[:3]]
    if found and len(found) < len(files):
        raise DataError(
            f"{folder} holds {len(files) - len(found)} images and {len(found)} packed files (such "
            f"as {found[0].relative_to(folder)}): move one kind away, or name the packed ones by a "
            f"pattern such as {folder / ('*' + found[0].suffix)}"
        )
    if not found:
        return []
    named = sets([path.relative_to(folder).as_posix() for path in found])
    if len(named) > 1:
        told = ", ".join("/".join(filter(None, name)) for name in named)
        raise DataError(f"{folder} holds several sets ({told}): name one with --split or --subset")
    return found
