"""Data sets of the Hugging Face hub, or in its layout: which files make up a split.

They are listed in the header of its README.md (`configs`) or told apart by their paths, as
`datasets` does; a set in another form is read from the Parquet copy that the hub makes of it.
Nothing of a set is run, and what was fetched stays in the hub's local cache.
"""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from erw.data.sources.files import folder
from erw.data.sources.labels import SPLITS, ending
from erw.errors import DataError, one_line

PACKED = (".tar", ".parquet", ".arrow")
Sets = dict[tuple[str, str], list[str]]  # (subset, split) -> files


def files_of(path: str, *, split: str | None, subset: str | None) -> tuple[str, list[Path]]:
    """Name and files of one split of OWNER/NAME, OWNER/NAME@REVISION or a local folder."""
    root, remote = Path(path).expanduser(), not Path(path).expanduser().exists()
    name, _, revision = path.partition("@") if remote else (root.name, "", "")
    files = _listed(name, revision) if remote else list(folder(root).entries)
    if remote and not revision and not any(ending(file) in PACKED for file in files):
        revision = "refs/convert/parquet"  # where the hub puts its Parquet copy
        files = _listed(name, revision)
    packed = [file for file in files if ending(file) in PACKED]
    if not packed:
        raise DataError(f"{path} has no Parquet, Arrow or tar files; give a folder of its images")
    available = sets(packed)
    if "README.md" in files:
        place = _fetched(name, revision, ["README.md"]) if remote else root
        available = _by_configs(place / "README.md", packed) or available
    fitting = [
        (one, part)
        for one, part in available
        if subset in (None, one) and (split is None or SPLITS.get(split, split) == part)
    ]
    if len(fitting) != 1:
        what = "several sets" if fitting else f"no set {'/'.join(filter(None, (subset, split)))}"
        names = ", ".join("/".join(filter(None, key)) for key in available)
        raise DataError(f"{name} has {what}: name one of {names} with --split or --subset")
    chosen = available[fitting[0]]
    root = _fetched(name, revision, chosen) if remote else root
    return f"{name}:{'/'.join(filter(None, fitting[0]))}", [root / file for file in chosen]


def sets(files: Iterable[str]) -> Sets:
    """Files by the words in their paths, the file's own name first; without any, all are train."""
    result: Sets = {}
    for file in sorted(files):
        *folders, name = file.split("/")
        known = [w for w in (*folders, *re.split(r"[^a-z]+", name.lower())) if w in SPLITS]
        subset = "/".join(f for f in folders if f not in SPLITS and f != "data")
        result.setdefault((subset, SPLITS[known[-1]] if known else "train"), []).append(file)
    return result


def _by_configs(readme: Path, files: Sequence[str]) -> Sets:
    """Files by the `configs` in the header of a README, which list patterns, each with a split."""
    from huggingface_hub import metadata_load

    result: Sets = {}
    try:
        for config in (metadata_load(readme) or {}).get("configs") or []:
            for entry in _as_list(config.get("data_files")):
                entry = entry if isinstance(entry, dict) else {"path": entry}
                split = entry.get("split", "train")
                key = (str(config.get("config_name", "default")), str(SPLITS.get(split, split)))
                patterns = _as_list(entry.get("path"))
                if some := [file for file in files if any(fnmatch(file, p) for p in patterns)]:
                    result.setdefault(key, []).extend(some)
    except Exception as error:  # of YAML's many types, too
        raise DataError(f"the header of {readme} cannot be read ({one_line(error)})") from error
    return result


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _listed(repo: str, revision: str) -> list[str]:
    """Paths of a data set's files: on the hub, or else those that were fetched before."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repo, revision=revision or None, timeout=20)
        return [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # network, gate and a name that is not there come as many types
        root = _fetched(repo, revision, None, reason=error)
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _fetched(repo: str, revision: str, files: Any, *, reason: Exception | None = None) -> Path:
    """The folder of these files in the hub's cache, downloaded unless for a `reason` not to."""
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision or None, "local_files_only": reason is not None}
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=files, **options))
    except Exception as error:
        what = f"cannot be fetched ({type(reason or error).__name__}: {one_line(reason or error)})"
        how = "connect, log in, or download it elsewhere and give its folder"
        raise DataError(f"data set {repo} on the Hugging Face hub {what}; {how}") from error
