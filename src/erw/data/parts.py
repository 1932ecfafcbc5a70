"""One prepared cache, in a folder or at a URL (anything that fsspec opens): its manifest and files.

Files at a URL are downloaded whole, once per machine, and named by their blake3, so that they serve
every cache, address and process, and what has a name is whole. (fsspec's own file cache neither
checks contents nor renames.)
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from erw.data.manifest import MANIFEST, Column, File, Manifest
from erw.errors import CacheError, raised_as
from erw.io import cache_home, hash_file, load_tensors, lock

AGAIN = "run the same erw prepare again"
UNREACHABLE = (
    "{} cannot be read: check address, network, credentials and disk; s3:// and https:// need pip "
    "install 'erw[remote]', gs:// gcsfs"
)


class Part(NamedTuple):
    """One prepared folder or URL. `local` gives the path of one of its files on this machine."""

    where: str
    manifest: Manifest
    identity: str
    local: Callable[[File], Path]


def open_part(path: str | Path) -> Part:
    """A finished cache in a folder or at a URL, its files unchecked.

    fsspec's file system finds credentials and addresses. Raises `CacheError` where it cannot be
    read, or is damaged.
    """
    local: Callable[[File], Path]
    if "://" in str(path):
        where = str(path).rstrip("/")
        with raised_as(CacheError, UNREACHABLE.format(f"{where}/{MANIFEST}")):
            from fsspec.core import url_to_fs

            files, root = url_to_fs(where)
            text = files.cat_file(f"{root}/{MANIFEST}")
        local = partial(_download, files, f"{root}/shards", f"{where}/shards")
    else:
        folder = Path(path).expanduser()
        if (folder / "online.json").is_file():
            raise CacheError(f"{folder} encodes while training (--online): give it alone")
        if not (folder / MANIFEST).is_file():
            again = f"run erw prepare IMAGES --out {folder}"
            raise CacheError(f"no cache at {folder}, or an unfinished one: {again}")
        where, text = str(folder), (folder / MANIFEST).read_bytes()
        local = lambda file: folder / "shards" / file.file  # noqa: E731
    manifest = Manifest.parse(text, where=f"{where}/{MANIFEST}")
    return Part(where, manifest, blake3(text).hexdigest()[:32], local)


def map_columns(path: Path, columns: Mapping[str, Column], *, rows: int) -> dict[str, Tensor]:
    """The mapped columns of a shard's file. Raises `CacheError` unless it holds these."""
    with raised_as(CacheError, f"shard {path} is damaged: {AGAIN}"):
        mapped, _ = load_tensors(path)
    for name, (dtype, shape) in columns.items():
        column = mapped.get(name, torch.empty(0))
        kind, expected = str(column.dtype).removeprefix("torch."), (rows, *shape)
        if kind != dtype or column.shape != expected:
            raise CacheError(
                f"shard {path} has {kind} {tuple(column.shape)} as {name}, not {dtype} {expected} "
                f"as the manifest says: {AGAIN}"
            )
    return mapped


def _download(files: Any, root: str, url: str, file: File) -> Path:
    """The path of a file on this machine. Raises `CacheError` if it cannot be had undamaged."""
    folder = Path(os.environ.get("ERW_SHARD_CACHE") or cache_home() / "shards").expanduser()
    path, tmp = folder / f"{file.blake3}.safetensors", folder / f".{file.blake3}.part"
    if path.is_file():
        return path
    failed = raised_as(CacheError, UNREACHABLE.format(f"{url}/{file.file}"))
    with lock(folder / f".{file.blake3}.lock", wait=True), failed:
        if path.is_file():  # another process has downloaded it meanwhile
            return path
        try:
            files.get_file(f"{root}/{file.file}", str(tmp))
            if hash_file(tmp) == file.blake3:
                return tmp.rename(path)
        finally:
            tmp.unlink(missing_ok=True)
    raise CacheError(
        f"shard {file.file} arrived damaged from {url}: try again, or check the original with "
        "erw prepare --verify and upload it"
    )
