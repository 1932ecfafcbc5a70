"""ADM's reference batches by name: downloaded once, into the user's cache folder."""

import zipfile
from pathlib import Path

from erw.errors import DataError
from erw.io import cache_home, download

BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
REFERENCES = {
    path.rpartition("/")[2]: BATCHES + path
    for path in (
        "imagenet/64/VIRTUAL_imagenet64_labeled.npz",
        "imagenet/128/VIRTUAL_imagenet128_labeled.npz",
        "imagenet/256/VIRTUAL_imagenet256_labeled.npz",
        "imagenet/512/VIRTUAL_imagenet512.npz",
        "lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
        "lsun/cat/VIRTUAL_lsun_cat256.npz",
        "lsun/horse/VIRTUAL_lsun_horse256.npz",
    )
}


def reference_batch(name: str) -> Path:
    """The local path of one of `REFERENCES`, downloaded if necessary (it has no published hash)."""
    path = download(REFERENCES[name], cache_home() / "references" / name)
    if not zipfile.is_zipfile(path):
        path.unlink()
        raise DataError(f"the download of {name} is damaged and was removed: try again")
    return path
