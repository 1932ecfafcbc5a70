"""Data sets of the Hugging Face hub: which files make up a split, told by their paths.

A set in another form is read from the Parquet copy that the hub makes of it. Nothing of a set is
run, and what was fetched stays in the hub's local cache.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from erw.data.sources.labels import SPLITS, ending
from erw.errors import DataError, one_line

PACKED = (".tar", ".parquet", ".arrow")


def files_of(path: str, *, split: str | None, subset: str | None) -> tuple[str, list[Path]]:
    """Name and files, downloaded, of one split of OWNER/NAME or OWNER/NAME@REVISION."""
    name, _, revision = path.partition("@")
    files = _listed(name, revision)
    if not revision and not any(ending(file) in PACKED for file in files):
        revision = "refs/convert/parquet"  # where the hub puts its Parquet copy
        files = _listed(name, revision)
    part, chosen = one_set([x for x in files if ending(x) in PACKED], name, split, subset)
    root = _fetched(name, revision, chosen)
    return f"{name}:{part}", [root / file for file in chosen]


def one_set(
    files: Iterable[str], name: object, split: str | None, subset: str | None
) -> tuple[str, list[str]]:
    """Which one of the sets in files of `name` these choose, and its files."""
    available, part = sets(files), split and SPLITS.get(split, split)
    fitting = [key for key in available if subset in (None, key[0]) and part in (None, key[1])]
    if len(fitting) != 1:
        problem = "several sets" if fitting else f"no set {'/'.join(filter(None, (subset, split)))}"
        names = ", ".join("/".join(filter(None, key)) for key in available)
        raise DataError(f"{name} has {problem}: name one of {names} with --split or --subset")
    return "/".join(filter(None, fitting[0])), available[fitting[0]]


def sets(files: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Files by subset and split, words in their paths, the file's own name first; else train."""
    result: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        *folders, name = file.split("/")
        words = [w for w in (*folders, *re.split(r"[^a-z]+", name.lower())) if w in SPLITS]
        subset = "/".join(f for f in folders if f not in SPLITS and f != "data")
        result.setdefault((subset, SPLITS[words[-1]] if words else "train"), []).append(file)
    return result


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
        failure = f"{type(reason or error).__name__}: {one_line(reason or error)}"
        problem = f"data set {repo} on the Hugging Face hub cannot be fetched ({failure})"
        hint = "connect, log in, or download it elsewhere and give its folder"
        raise DataError(f"{problem}; {hint}") from error
