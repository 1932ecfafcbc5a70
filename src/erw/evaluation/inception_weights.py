"""Weights of the 2015 Inception network, from a file of pytorch-fid or torch-fidelity.

Give a path, or put one of `FILES` in the user's cache folder or in the folder that $ERW_WEIGHTS
names; otherwise the first of them is downloaded, where the network allows.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from erw.encoders.pretrained import load_exactly, read_checkpoint
from erw.errors import CheckpointError
from erw.evaluation.inception import Inception
from erw.io import cache_home, download

FILES = {
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/"
    "download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/"
    "releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
}
SHA256 = "6726825d"
"""First digits of the SHA-256 of both files."""


class Loaded(NamedTuple):
    """The network with the name and SHA-256 of the file its weights are from."""

    net: Inception
    file: str
    sha256: str


def find_inception(path: str | Path | None = None) -> Path:
    """The weights file: `path`, or one of `FILES` in $ERW_WEIGHTS or the user's cache folder.

    Without any, the first of `FILES` is downloaded. Raises FileNotFoundError that says where to get
    one by hand, DataError where the server sent another file.
    """
    first, url = next(iter(FILES.items()))
    home = cache_home() / "weights"
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no Inception weights at {path}: download {url} there")
        return Path(path)
    own = os.environ.get("ERW_WEIGHTS")
    for folder in ([Path(own)] if own else []) + [home]:
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    try:
        return download(url, home / first, sha256=SHA256)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no Inception weights for FID: {error}, or give its path (--weights FILE); fd-lite2 "
            "needs no download"
        ) from error


def load_inception(path: str | Path | None = None, *, device: str = "cpu") -> Loaded:
    """The 2015 Inception network with weights from a file, batch norms folded.

    Args:
        path: the file; None: wherever `find_inception` finds one.

    Raises:
        FileNotFoundError: no file; the message says where to get one.
        CheckpointError: a published name with another hash, a damaged file, or other weights.
    """
    path = find_inception(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.name in FILES and not digest.startswith(SHA256):
        raise CheckpointError(
            f"{path} has SHA-256 {digest[:16]}..., expected {SHA256}...: it is another file or "
            f"damaged; download {FILES[path.name]}"
        )
    state = read_checkpoint(path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected weights by name")
    net = Inception()
    # Files of before PyTorch 0.4 have no counters of batches, which nothing here reads.
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    load_exactly(net, counters | state, f"{path} is no Inception of 2015")
    net.fold()
    return Loaded(net.to(device), path.name, digest)
