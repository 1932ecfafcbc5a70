"""Weights of the 2015 Inception network, from the files that are about, none of them run as code.

| file                                    | of                                               |
| pt_inception-2015-12-05-6726825d.pth    | mseitzer/pytorch-fid (release fid_weights)       |
| weights-inception-2015-12-05-*.pth      | toshas/torch-fidelity (release v0.2.0)           |
| classify_image_graph_def.pb             | ADM's evaluator: TensorFlow's own frozen graph   |

Give a path, or put one of these files in the user's cache folder or in the folder that $ERW_WEIGHTS
names; otherwise the first of them is downloaded, where the network allows.
"""

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import CheckpointError
from erw.evaluation.graphdef import Graph, read_graph
from erw.evaluation.inception import Inception, folded
from erw.evaluation.inception_table import names
from erw.evaluation.published import download
from erw.io import cache_home as cache_folder

FILES = {
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/"
    "download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/"
    "releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "classify_image_graph_def.pb": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
    "ref_batches/classify_image_graph_def.pb",
}
SHA256 = "6726825d"
"""First digits of the SHA-256 of both .pth files; of the .pb none is published."""


class Loaded(NamedTuple):
    """The network with the name and SHA-256 of the file its weights are from."""

    net: Inception
    file: str
    sha256: str


def find_inception(path: str | Path | None = None) -> Path:
    """The weights file: `path`, or one of `FILES` in $ERW_WEIGHTS or the user's cache folder.

    Without any the first of `FILES` is downloaded. Raises FileNotFoundError that says where to get
    one by hand, DataError where another file came.
    """
    first, url = next(iter(FILES.items()))
    home = cache_folder() / "weights"
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no Inception weights at {path}: download {url} there")
        return Path(path)
    told = os.environ.get("ERW_WEIGHTS")
    for folder in ([Path(told)] if told else []) + [home]:
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    try:
        download(url, home / first, sha256=SHA256)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no Inception weights for FID: {error}, or give its path (--weights FILE); "
            f"{list(FILES)[2]} of ADM's evaluator will do as well; fd-lite2 needs no download"
        ) from error
    return home / first


def load_inception(
    path: str | Path | None = None, *, device: str = "cpu", sha256: str = SHA256
) -> Loaded:
    """The 2015 Inception network with weights from a file (see the table of this module).

    Args:
        path: the file; None: wherever `find_inception` finds one.
        sha256: first digits that a PyTorch file's SHA-256 must have; "" takes any.

    Raises:
        FileNotFoundError: no file; the message says where to get one.
        CheckpointError: another hash, a file that is cut short, or of another network.
    """
    path = find_inception(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    graph = path.suffix == ".pb"
    if not graph and not digest.startswith(sha256):
        raise CheckpointError(
            f"{path} has SHA-256 {digest[:16]}..., expected {sha256}...: it is another file or was "
            f"cut short; download {next(iter(FILES.values()))}"
        )
    state = from_graph(read_graph(path), path) if graph else _read(path)
    net = Inception()
    try:
        weights = folded(state)
        net.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} holds another network than Inception of 2015: {' '.join(what.split())[:300]}"
        ) from error
    return Loaded(net.to(device), path.name, digest)


def from_graph(graph: Graph, path: Path) -> dict[str, Tensor]:
    """The graph's constants under their names in PyTorch files.

    Raises CheckpointError for a graph without them, or where sFID's map would not be ReLU's output.
    """
    if (op := graph.ops.get("mixed_6/conv")) != "Relu":
        raise CheckpointError(
            f"{path}: mixed_6/conv is {op or 'absent'}, expected Relu, whose output sFID is "
            "defined with: this is not ADM's Inception graph"
        )

    def take(name: str) -> Tensor:
        if name not in graph.constants:
            raise CheckpointError(f"{path} has no constant {name}: not the Inception graph of 2015")
        return torch.from_numpy(graph.constants[name])

    state: dict[str, Tensor] = {}
    for ours, theirs in names().items():
        # TensorFlow's kernels are (h, w, in, out).
        state[f"{ours}.conv.weight"] = take(f"{theirs}/conv2d_params").permute(3, 2, 0, 1)
        for key, name in NORM.items():
            state[f"{ours}.bn.{key}"] = take(f"{theirs}/batchnorm/{name}")
    state["fc.weight"] = take("softmax/weights").T
    state["fc.bias"] = take("softmax/biases")
    return state


NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
"""A batch norm's parts in PyTorch -> in the graph."""


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no file of plain weights ({str(error).splitlines()[0][:120]}); archives "
            "with code in them are not run: give one of " + ", ".join(FILES)
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected weights by name")
    return state
