"""Published files by name: downloaded once, checked, kept in the user's cache folder, never run.

$ERW_OFFLINE=1 forbids it; a file that is there already is never asked for again.
"""

import hashlib
import os
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from erw.errors import DataError
from erw.io import cache_home as cache_folder

BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
REFERENCES = {
    "VIRTUAL_imagenet64_labeled.npz": f"{BATCHES}imagenet/64/VIRTUAL_imagenet64_labeled.npz",
    "VIRTUAL_imagenet128_labeled.npz": f"{BATCHES}imagenet/128/VIRTUAL_imagenet128_labeled.npz",
    "VIRTUAL_imagenet256_labeled.npz": f"{BATCHES}imagenet/256/VIRTUAL_imagenet256_labeled.npz",
    "VIRTUAL_imagenet512.npz": f"{BATCHES}imagenet/512/VIRTUAL_imagenet512.npz",
    "VIRTUAL_lsun_bedroom256.npz": f"{BATCHES}lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
    "VIRTUAL_lsun_cat256.npz": f"{BATCHES}lsun/cat/VIRTUAL_lsun_cat256.npz",
    "VIRTUAL_lsun_horse256.npz": f"{BATCHES}lsun/horse/VIRTUAL_lsun_horse256.npz",
}
"""ADM's reference batches. No hashes are published: the archives' own sums are checked."""
TIMEOUT = 20.0
Check = Callable[[Path], None]


def reference_batch(name: str) -> Path:
    """One of `REFERENCES`: where it lies, after a download if need be.

    Raises FileNotFoundError or DataError as `download`.
    """
    path = cache_folder() / "references" / name
    if not path.is_file():
        download(REFERENCES[name], path, check=_whole)
    return path


def download(url: str, path: Path, *, sha256: str = "", check: Check | None = None) -> None:
    """Fetch `url` to `path`: beside it first, renamed once it is whole and has been checked.

    Args:
        sha256: first digits that its SHA-256 must have.
        check: raises DataError for a file that is not what it should be.

    Raises:
        FileNotFoundError: it cannot be had; the message says what to put where by hand.
        DataError: what came is another file.
    """
    if os.environ.get("ERW_OFFLINE") == "1":
        raise _by_hand(url, path, "$ERW_OFFLINE is 1")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
    digest = hashlib.sha256()
    try:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, beside.open("wb") as file:
                told = answer.headers.get("Content-Length")
                while block := answer.read(1 << 20):
                    digest.update(block)
                    file.write(block)
                size = file.tell()
        except (OSError, ValueError) as error:  # URLError, timeouts and refusals are OSErrors
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is an answer, too
            raise _by_hand(url, path, str(getattr(error, "reason", error))) from error
        if told is not None and size != int(told):
            raise _by_hand(url, path, f"cut off after {size} of {told} bytes")
        if not (found := digest.hexdigest()).startswith(sha256):
            raise DataError(
                f"{url} gave a file of SHA-256 {found[:16]}..., expected {sha256}...: it was "
                "thrown away; something between here and there answers in its place"
            )
        if check is not None:
            check(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _by_hand(url: str, path: Path, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"cannot download {url} ({' '.join(reason.split())}): fetch it elsewhere and put it at "
        f"{path}"
    )


def _whole(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile as error:
        bad = str(error)
    if bad is not None:
        raise DataError(f"the reference batch that was downloaded is damaged ({bad}): try again")
