"""Caches at a URL: anything fsspec opens. Files are downloaded whole, once per machine.

A downloaded file is named by its blake3, so that it serves every cache, address and process, and
what has a name is whole. (fsspec's own file cache neither checks contents nor renames.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from erw.data.cache import Part
from erw.data.manifest import MANIFEST, File, Manifest
from erw.errors import CacheError, one_line
from erw.io import cache_home, hash_file, lock


def open_remote(url: str) -> Part:
    """A finished cache at a URL; fsspec's file system finds credentials and addresses.

    Raises:
        CacheError: it cannot be read, or is damaged.
    """
    url = url.rstrip("/")
    with _errors(f"{url}/{MANIFEST}"):
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url)
        text = files.cat_file(f"{root}/{MANIFEST}")
    manifest = Manifest.parse(text, where=f"{url}/{MANIFEST}")
    local = partial(_download, files, f"{root}/shards", f"{url}/shards")
    return Part(url, manifest, blake3(text).hexdigest()[:32], local)


def _download(files: Any, root: str, url: str, file: File) -> Path:
    """The path of a file on this machine. Raises `CacheError` if it cannot be had undamaged."""
    folder = Path(os.environ.get("ERW_SHARD_CACHE") or cache_home() / "shards").expanduser()
    path, tmp = folder / f"{file.blake3}.safetensors", folder / f".{file.blake3}.part"
    if path.is_file():
        return path
    with lock(folder / f".{file.blake3}.lock", wait=True), _errors(f"{url}/{file.file}"):
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


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Any file system's errors, also those of botocore and aiohttp, as `CacheError` in one line."""
    try:
        yield
    except Exception as error:
        raise CacheError(
            f"{name} cannot be read ({one_line(error)}): check address, network, credentials and "
            "disk; s3:// and https:// need pip install 'erw[remote]', gs:// gcsfs"
        ) from error
