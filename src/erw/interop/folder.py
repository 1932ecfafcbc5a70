"""Reading an exported folder, here or on the hub: safetensors and JSON, never code."""

import re
from pathlib import Path

import torch
from torch import Tensor

from erw.config import Run, from_dict
from erw.errors import CheckpointError, one_line
from erw.interop.dit import from_folder
from erw.interop.files import FOLDER_FILE, read_weights
from erw.interop.layouts import Parts, depth_of
from erw.interop.measure import fitting
from erw.interop.record import RECORD, read_record
from erw.models import SiT
from erw.training.build import build_model
from erw.training.trained import Trained

NAME = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_FILE = "model.safetensors"
WEIGHTS = (f"transformer/{FOLDER_FILE}", PLAIN_FILE)
READ = (RECORD, *WEIGHTS, "vae/config.json", f"vae/{FOLDER_FILE}")
MOST_POSITIONS = 2**28  # numbers in the table of positions: far above any model there is


def from_pretrained(
    where: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """A model that `erw.export` or `erw.push_to_hub` wrote: a folder, or "owner/name" on the hub.

    Only safetensors and JSON are fetched and read; code in the folder is left alone.

    Args:
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such folder or repository, the hub cannot be reached, or what is there
            is no whole export.
    """
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = _fetched(str(where), revision)
    record = read_record(folder)
    run = from_dict(Run, record["run"])
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no {' or '.join(WEIGHTS)}; get it again")
    tensors = {k.removeprefix("net."): v for k, v in read_weights(file).tensors.items()}
    if any(name.startswith("transformer_blocks.") for name in tensors):
        tensors = from_folder(tensors, run.model.num_classes or 0, file)
    net = _network(run, tensors, file)
    vae, scaling = record["vae"], record.get("scaling")
    if (folder / "vae" / "config.json").is_file():  # which has the scaling too
        vae, scaling = str(folder / "vae"), None
    names = tuple(record["class_names"])
    if names and len(names) != net.null_class:
        raise CheckpointError(
            f"{folder / RECORD} names {len(names)} classes, the weights have {net.null_class}"
        )
    net = net.to(device).eval().requires_grad_(False)
    return Trained(net, run, vae, names, record["step"], scaling, str(where), record["average"])


def _fetched(repo: str, revision: str | None) -> Path:
    """The readable files of a repository in the hub's local cache."""
    if not NAME.fullmatch(repo):
        raise CheckpointError(f"no folder {repo}, and that is no owner/name on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(READ)))
    except Exception as error:  # network, gate and disk come as many types
        line = one_line(error)
        raise CheckpointError(
            f"there is no folder {repo}, and the hub's repository of that name cannot be fetched: "
            f"{line}; connect, log in where it asks so, or give a local folder"
        ) from error


def _network(run: Run, tensors: dict[str, Tensor], file: Path) -> SiT:
    """The network of the settings with these weights; sizes are checked before any is believed."""
    model = run.model
    side, channels, classes = model.input_size, model.channels, model.num_classes
    if side is None or channels is None or classes is None or min(side, channels) < 1:
        raise CheckpointError(f"{file.parent}: {RECORD} does not say the latent's size")
    if (
        model.depth != depth_of(tensors)
        or (side // model.patch) ** 2 * model.width > MOST_POSITIONS
    ):
        raise CheckpointError(
            f"{file} has {depth_of(tensors)} blocks, and {RECORD} tells of {model.depth} on "
            f"{side} x {side}: not of one model; get it again"
        )
    with torch.device("meta"):
        fitting(
            build_model(model, outputs=run.flow.outputs), Parts(tensors, {}, {}), file, warm=False
        )
    net = build_model(model, outputs=run.flow.outputs)
    net.load_state_dict(tensors)
    return net
