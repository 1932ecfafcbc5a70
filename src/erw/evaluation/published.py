"""ADM's reference batches by name: downloaded once, into the user's cache folder."""

import zipfile
from pathlib import Path

from erw.errors import DataError
from erw.io import cache_home, download

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


def reference_batch(name: str) -> Path:
    """The local path of one of `REFERENCES`, after a download if necessary.

    Raises FileNotFoundError as `erw.io.download`, DataError where what was sent is no whole archive
    (no hashes are published).
    """
    path = download(REFERENCES[name], cache_home() / "references" / name)
    if not zipfile.is_zipfile(path):
        path.unlink()
        raise DataError(f"the download of {name} is damaged and was removed: try again")
    return path
