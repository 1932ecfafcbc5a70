"""Data sets of the Hugging Face hub: which files make up a split, and how they come here.

Nothing of a data set is run. Its files are Parquet, Arrow or WebDataset archives, listed by split
in the header of its README.md (`configs`) or told apart by their paths, as `datasets` does; a set
in any other form is read from the Parquet copy that the hub makes of it. What was fetched stays in
the hub's local cache. A local folder in the same layout is read in the same way.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from erw.data.images import EXTENSIONS
from erw.data.sources.base import ending
from erw.data.sources.files import Folder
from erw.data.sources.labels import SPLITS
from erw.errors import DataError, one_line

PACKED = (".tar", ".parquet", ".arrow")
CONVERTED = "refs/convert/parquet"  # where the hub puts its Parquet copy
README = "README.md"

Sets = dict[tuple[str, str], list[str]]


def files_of(path: str, *, split: str | None, subset: str | None) -> tuple[str, list[Path]]:
    """Name and files of one split of OWNER/NAME, OWNER/NAME@REVISION or a local folder.

    Raises `DataError` if there is no such set or split, if there are several and none is named, or
    if the hub cannot be reached and the files are not here.
    """
    root, revision, repo = Path(path).expanduser(), "", ""
    if root.exists():
        name, files = root.name, list(Folder(root).entries)
    else:
        name, _, revision = path.partition("@")
        repo, files = name, _files(name, revision)
        if not revision and not any(file.endswith(PACKED) for file in files):
            revision = CONVERTED
            files = _files(repo, revision)
    configs = []
    if README in files:
        root = _fetched(repo, revision, [README]) if repo else root
        configs = _configs(root / README)
    packed = [file for file in files if ending(file) in PACKED]
    if not packed:
        raise DataError(
            f"{path} has no Parquet, Arrow or tar files: download it and give the folder of images"
        )
    available = _by_configs(configs, packed) or sets(packed)
    fitting = [
        (group, part)
        for group, part in available
        if subset in (None, group) and (split is None or SPLITS.get(split, split) == part)
    ]
    if len(fitting) != 1:
        requested = "/".join(filter(None, (subset, split)))
        names = ", ".join("/".join(filter(None, key)) for key in available)
        what = f"no set {requested}" if requested and not fitting else "several sets"
        raise DataError(f"{name} has {what}: name one of {names} with --split or --subset")
    chosen = available[fitting[0]]
    root = _fetched(repo, revision, chosen) if repo else root
    return f"{name}:{'/'.join(filter(None, fitting[0]))}", [root / file for file in chosen]


def sets(files: Iterable[str]) -> Sets:
    """(subset, split) -> files, by the words in their paths; without any, all are of train.

    The file's own name counts before its folders.
    """
    result: Sets = {}
    for file in sorted(files):
        *folders, name = file.split("/")
        known = [w for w in (*folders, *re.split(r"[^a-z]+", name.lower())) if w in SPLITS]
        subset = "/".join(f for f in folders if f not in SPLITS and f != "data")
        split = SPLITS[known[-1]] if known else "train"
        result.setdefault((subset, split), []).append(file)
    return result


def has_shards(folder: Folder) -> bool:
    """Whether a folder holds shards instead of loose images. `DataError` if it holds both."""
    loose = [key for key in folder.entries if ending(key) in EXTENSIONS]
    packed = [key for key in folder.entries if ending(key) in PACKED]
    kinds = sorted({ending(key) for key in packed})
    pattern = f"a pattern such as '{folder.root}/*{kinds[0]}'" if packed else ""
    if packed and loose:
        raise DataError(
            f"{folder.root} holds {len(loose)} images and {len(packed)} packed files (such as "
            f"{packed[0]}): move one kind away, or name the packed ones by {pattern}"
        )
    if len(kinds) > 1:
        raise DataError(f"{folder.root} holds {' and '.join(kinds)} files: name one by {pattern}")
    return bool(packed)


def _by_configs(configs: Sequence[Any], files: Sequence[str]) -> Sets:
    """The sets that a README's `configs` list: patterns of files, each with a split."""
    result: Sets = {}
    for config in configs:
        entries = config.get("data_files", [])
        for entry in [entries] if isinstance(entries, str | dict) else entries:
            entry = entry if isinstance(entry, dict) else {"path": entry}
            patterns = entry.get("path", [])
            patterns = [patterns] if isinstance(patterns, str) else patterns
            split = SPLITS.get(entry.get("split", "train"), entry.get("split"))
            if some := [file for file in files if any(fnmatch(file, p) for p in patterns)]:
                key = (str(config.get("config_name", "default")), str(split))
                result.setdefault(key, []).extend(some)
    return result


def _configs(path: Path) -> list[Any]:
    """`configs` in the header of a README."""
    from huggingface_hub import metadata_load

    try:
        configs = (metadata_load(path) or {}).get("configs") or []
        return [config for config in configs if isinstance(config, dict)]
    except Exception as error:  # of YAML's many types, too
        raise DataError(f"the header of {path} cannot be read ({one_line(error)})") from error


def _files(repo: str, revision: str) -> list[str]:
    """Paths of a data set's files: on the hub, or else those that were fetched before."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().dataset_info(repo, revision=revision or None, timeout=20)
        return [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # network, gate and a name that is not there come as many types
        try:
            options = {"revision": revision or None, "local_files_only": True}
            root = Path(snapshot_download(repo, repo_type="dataset", **options))
        except Exception:
            raise _unreachable(repo, error) from error
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _fetched(repo: str, revision: str, files: list[str]) -> Path:
    """The folder in the hub's local cache with these files, downloaded where they are missing."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision or None, allow_patterns=files
            )
        )
    except Exception as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> DataError:
    return DataError(
        f"data set {repo} on the Hugging Face hub cannot be fetched ({type(error).__name__}: "
        f"{one_line(error)}); connect, log in where it asks so, or download it elsewhere and give "
        "its folder"
    )
