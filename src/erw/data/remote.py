"""Caches at a URL: anything fsspec opens. Files are downloaded whole, once per machine.

A downloaded file is named by its blake3, so that it serves every cache, address and process, and
what has a name is whole. (fsspec's own file cache neither checks contents nor renames.)
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from erw.data.cache import Part
from erw.data.manifest import MANIFEST, Manifest
from erw.data.shards import File
from erw.errors import CacheError, one_line
from erw.io import cache_home, hash_file, lock

FOLDER = "ERW_SHARD_CACHE"
TRIES = 3
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs"} | dict.fromkeys(
    ("s3", "s3a", "http", "https"), "'erw[remote]'"
)


def open_remote(url: str) -> Part:
    """A finished cache at a URL; fsspec's file system finds credentials and addresses.

    Raises:
        CacheError: it cannot be read, or is damaged.
    """
    url = url.rstrip("/")
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url)
    except ImportError as error:
        kind = url.partition(":")[0]
        package = _PACKAGES.get(kind)
        hint = f"pip install {package}" if package else one_line(error)
        raise CacheError(f"{url}: a package to read {kind}:// is missing: {hint}") from error
    except Exception as error:  # every file system raises its own
        raise CacheError(f"{url} cannot be opened: {one_line(error)}") from error
    text = _try(partial(files.cat_file, f"{root}/{MANIFEST}"), f"{url}/{MANIFEST}")
    manifest = Manifest.parse(text, where=f"{url}/{MANIFEST}")
    local = partial(_download, files, f"{root}/shards", f"{url}/shards")
    return Part(url, manifest, blake3(text).hexdigest()[:32], local)


def _download(files: Any, root: str, url: str, file: File) -> Path:
    """One file on this machine. Raises `CacheError` if it cannot be had, or arrives damaged."""
    folder = Path(os.environ.get(FOLDER) or cache_home() / "shards").expanduser()
    path = folder / f"{file.blake3}.safetensors"
    if path.is_file():
        return path
    with lock(folder / f".{file.blake3}.lock", waiting=lambda: None):
        if path.is_file():  # another process has downloaded it meanwhile
            return path
        tmp = folder / f".{file.blake3}.part"
        try:
            for _ in range(TRIES):
                _try(partial(files.get_file, f"{root}/{file.file}", str(tmp)), f"{url}/{file.file}")
                if hash_file(tmp) == file.blake3:
                    return tmp.rename(path)
        finally:
            tmp.unlink(missing_ok=True)
    raise CacheError(
        f"shard {file.file} arrived damaged from {url} {TRIES} times: check the original with "
        "erw prepare --verify and upload it again"
    )


def _try(get: Any, name: str) -> Any:
    """What `get` returns, in one of three attempts; `CacheError` in one line if none succeeds."""
    for attempt in range(TRIES):
        try:
            return get()
        except FileNotFoundError as error:
            raise CacheError(
                f"{name} is not there: check the address, and that erw prepare has finished"
            ) from error
        except PermissionError as error:
            raise CacheError(f"{name} may not be read: {one_line(error)}") from error
        except Exception as error:  # OSError, and those of botocore and aiohttp
            if attempt == TRIES - 1:
                raise CacheError(
                    f"{name} cannot be read ({one_line(error)}): check network, credentials and "
                    f"room in {os.environ.get(FOLDER) or cache_home() / 'shards'}"
                ) from error
    raise AssertionError("the last attempt returns or raises")
