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
from erw.data.sources.folder import Folder
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
    folder = Path(path).expanduser()
    if folder.exists():
        files = [entry.key for entry in Folder(folder).entries]
        chosen, used = _chosen(path, files, _configs(folder), split=split, subset=subset)
        return f"{folder.name}:{used}", [folder / file for file in chosen]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path):
        raise DataError(f"{path} is no folder and no data set of the hub: expected OWNER/NAME")
    repo, _, revision = path.partition("@")
    files = _files(repo, revision or None)
    if not revision and not any(file.endswith(PACKED) for file in files):
        revision = CONVERTED
        files = _files(repo, revision)
    configs = _configs(_fetched(repo, revision or None, [README])) if README in files else []
    chosen, used = _chosen(repo, files, configs, split=split, subset=subset)
    root = _fetched(repo, revision or None, chosen)
    return f"{repo}:{used}", [root / file for file in chosen]


def sets(files: Iterable[str]) -> Sets:
    """(subset, split) -> files, by the words in their paths; without any, all are of train.

    The file's own name counts before its folders.
    """
    result: Sets = {}
    for file in sorted(files):
        *folders, name = file.split("/")
        words = [*folders, *re.split(r"[^a-z]+", name.lower())]
        known = [word for word in words if word in SPLITS]
        split = SPLITS[known[-1]] if known else "train"
        rest = [folder for folder in folders if folder not in SPLITS and folder != "data"]
        result.setdefault(("/".join(rest), split), []).append(file)
    return result


def has_shards(folder: Folder) -> bool:
    """Whether a folder holds shards instead of loose images. `DataError` if it holds both."""
    loose = [e.key for e in folder.entries if ending(e.key) in EXTENSIONS]
    packed = [e.key for e in folder.entries if ending(e.key) in PACKED]
    kinds = sorted({ending(key) for key in packed})
    pattern = f"a pattern such as '{folder.root / ('*' + kinds[0])}'" if packed else ""
    if packed and loose:
        raise DataError(
            f"{folder.root} holds {len(loose)} images and {len(packed)} packed files (such as "
            f"{packed[0]}): move one kind away, or name the packed ones by {pattern}"
        )
    if len(kinds) > 1:
        raise DataError(f"{folder.root} holds {' and '.join(kinds)} files: name one by {pattern}")
    return bool(packed)


def _chosen(
    path: str, files: Sequence[str], configs: list[Any], *, split: str | None, subset: str | None
) -> tuple[list[str], str]:
    """The files of one set, and its name."""
    packed = [file for file in files if file.lower().endswith(PACKED)]
    if not packed:
        raise DataError(
            f"{path} has no Parquet, Arrow or tar files: download it and give the folder of images"
        )
    available = _by_configs(configs, packed) or sets(packed)
    fitting = {
        name: chosen
        for name, chosen in available.items()
        if subset in (None, name[0]) and (split is None or SPLITS.get(split, split) == name[1])
    }
    if len(fitting) != 1:
        requested = "/".join(filter(None, (subset, split)))
        names = ", ".join("/".join(filter(None, name)) for name in available)
        what = f"no set {requested}" if requested and not fitting else "several sets"
        raise DataError(f"{path} has {what}: name one of {names} with --split or --subset")
    ((name, chosen),) = fitting.items()
    return chosen, "/".join(filter(None, name))


def _by_configs(configs: list[Any], files: list[str]) -> Sets:
    """The sets that a README's `configs` list: patterns of files, each with a split."""
    result: Sets = {}
    for config in configs:
        entries = config.get("data_files", []) if isinstance(config, dict) else []
        for entry in [entries] if isinstance(entries, str | dict) else entries:
            entry = entry if isinstance(entry, dict) else {"path": entry}
            patterns = entry.get("path", [])
            patterns = [patterns] if isinstance(patterns, str) else patterns
            split = SPLITS.get(entry.get("split", "train"), entry.get("split"))
            if some := [file for file in files if any(fnmatch(file, str(p)) for p in patterns)]:
                subset = str(config.get("config_name", "default"))
                result.setdefault((subset, str(split)), []).extend(some)
    return result


def _configs(folder: Path) -> list[Any]:
    """`configs` in the header of a README; empty without one."""
    path = folder / README
    if not path.is_file():
        return []
    from huggingface_hub import metadata_load

    try:
        return list((metadata_load(path) or {}).get("configs") or [])
    except Exception as error:  # of YAML's many types, too
        raise DataError(f"the header of {path} cannot be read ({one_line(error, 120)})") from error


def _files(repo: str, revision: str | None) -> list[str]:
    """Paths of a data set's files: on the hub, or else those that were fetched before."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=20)
        return [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # network, gate and a name that is not there come as many types
        try:
            root = _fetched(repo, revision, None)
        except DataError:
            raise _unreachable(repo, error) from error
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _fetched(repo: str, revision: str | None, files: list[str] | None) -> Path:
    """The folder in the hub's local cache with these files, downloaded where they are not there.

    None: whatever is there, without a download.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, repo_type="dataset", allow_patterns=files,
                local_files_only=files is None,
            )
        )  # fmt: skip
    except Exception as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> DataError:
    return DataError(
        f"data set {repo} on the Hugging Face hub cannot be fetched ({type(error).__name__}: "
        f"{one_line(error)}); connect, log in where it asks so, or download it elsewhere and give "
        "its folder"
    )
