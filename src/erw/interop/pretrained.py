"""Released checkpoints, exported folders and runs as one kind of model, `Trained`: t = 0 is data,
and a flow model gives the velocity noise - data, whatever its file's network predicts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw.align import Projector
from erw.errors import CheckpointError, ConfigError, one_line
from erw.interop.layouts import FLIPPED, SIGMA, TIMES, without_sigma
from erw.interop.metadata import METADATA, read_metadata
from erw.interop.released import check_fit, read_released
from erw.interop.safe_load import FOLDER_FILE, read_weights
from erw.io import misfit
from erw.models import build_model
from erw.training.trained import Trained, is_run, load

FILES = (".pt", ".pth", ".bin", ".safetensors")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_FILE = "model.safetensors"
EXPORTED = (f"transformer/{FOLDER_FILE}", PLAIN_FILE)
VAES = {4: "sd-vae-ft-ema", 32: "va-vae"}  # by latent channels


def load_pretrained(
    path: str | Path,
    layout: str = "auto",
    *,
    projectors: bool = True,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Trained:
    """A released checkpoint of DiT, SiT, REPA, ERW, REG or LightningDiT as our model.

    Time and sign of SiT's and LightningDiT's files are turned into ours in their weights, which
    changes outputs by float32 rounding. A DiT keeps its meaning: `net(x, steps, y)` gives noise
    and variance (B, 2C, h, w). REG's class token travels with the latents (`net.join`).

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file, or a diffusers DiT folder. Nothing in
            it is run.
        layout: "dit", "sit", "repa", "erw", "reg", "lightningdit", "diffusers-dit"; "auto" detects
            it from keys and shapes, and asks where two layouts look the same.
        projectors: False drops the alignment heads.
        options: what the file does not say, see `read_released`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, hostile, ambiguous, or not this layout's; missing, unexpected and
            mis-shaped keys are listed.
    """
    file = read_released(path, layout, **options)
    tensors, run = file.net, file.run
    if file.outputs > run.flow.outputs:
        tensors = without_sigma(tensors)
    if TIMES[file.layout] == FLIPPED:
        tensors = in_our_time(tensors, negate=run.flow.prediction == "velocity")
    model = build_model(run.model, outputs=run.flow.outputs)
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    heads = _projectors(file.projectors if projectors else {}, model.width, path)
    vae = VAES.get(model.channels, f"a VAE of {model.channels} channels")
    origin = file.origin + f", {len(heads)} projector(s)" * bool(heads)
    for module in (model, heads):
        module.to(device).eval().requires_grad_(False)
    return Trained(
        model, run, vae, source=str(path), projectors=heads, missing=file.optional, origin=origin
    )


def from_pretrained(
    source: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu"
) -> Trained:
    """A model that `erw.export` or `erw.push_to_hub` wrote: a folder, or "owner/name" on the hub.

    Only safetensors and JSON are fetched and read; code in the folder is not run.

    Args:
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such folder or repository, the hub cannot be reached, or the export is
            not complete.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source), revision)
    meta = read_metadata(folder)
    run, names = meta.run, meta.class_names
    exists = [folder / name for name in EXPORTED if (folder / name).is_file()]
    file = (exists or [folder / PLAIN_FILE])[0]
    tensors = {k.removeprefix("net."): v for k, v in read_weights(file).tensors.items()}
    check_fit(tensors, run.model, outputs=run.flow.outputs, source=file)
    net = build_model(run.model, outputs=run.flow.outputs)
    net.load_state_dict(tensors)
    net.to(device).eval().requires_grad_(False)
    if len(names) not in (0, net.null_class):
        raise CheckpointError(f"{folder} names {len(names)} classes, of {net.null_class}")
    vae, scaling = meta.vae, meta.scaling
    if (folder / "vae" / "config.json").is_file():  # which has the scaling too
        vae, scaling = str(folder / "vae"), None
    return Trained(
        net, run, vae, names, meta.step, scaling, str(source), meta.average, origin=meta.origin
    )


def open_model(
    path: str | Path,
    *,
    checkpoint: str | int = "last",
    device: torch.device | str = "cpu",
    **options: Any,
) -> Trained:
    """The model at a path: a run (whatever `erw.load` takes), an exported folder, or a released
    checkpoint, which `options` say how to read (see `load_pretrained`).

    Raises:
        ConfigError: options for a run or an exported folder, which need none, or a checkpoint of
            something that is no run.
        CheckpointError, FileNotFoundError: as `erw.load`, `from_pretrained`, `load_pretrained`.
    """
    path = Path(path).expanduser()
    options = {k: v for k, v in options.items() if v not in (None, "auto")}
    if options and is_ours(path):
        raise ConfigError(f"{path} says itself what it is; leave out {', '.join(options)}")
    if is_run(path) or (path.is_dir() and not is_model(path)):  # `load` says what is missing
        return load(path, checkpoint=checkpoint, device=device)
    if checkpoint != "last":
        raise ConfigError(f"{path} is no run, so it has no checkpoint {checkpoint}; leave it out")
    if (path / METADATA).is_file():
        return from_pretrained(path, device=device)
    return load_pretrained(path, **options, device=device)


def is_model(path: str | Path) -> bool:
    """Whether the path is what `open_model` takes, by its name and contents."""
    path = Path(path).expanduser()
    if path.is_file():
        return path.suffix in FILES
    return is_ours(path) or (path / FOLDER_FILE).is_file()


def is_ours(path: str | Path) -> bool:
    """Whether the path is a run or an exported folder, which say themselves what they are."""
    return is_run(path) or (Path(path) / METADATA).is_file()


def in_our_time(tensors: Mapping[str, Tensor], *, negate: bool) -> dict[str, Tensor]:
    """The weights of net(x, 1 - t), or of its negative, from those of net(x, t), up to rounding.

    The sinusoids of 1 - t are a fixed rotation and reflection of those of t, which the first layer
    of the time embedding absorbs. The last layer changes the sign of a velocity; noise, score and
    clean latent are the same in either direction.
    """
    first = "t_embedder.mlp.0.weight"
    cos, sin = tensors[first].double().chunk(2, dim=1)
    half = cos.shape[1]
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    c, s = omega.cos(), omega.sin()
    turned = {first: torch.cat([cos * c + sin * s, cos * s - sin * c], 1).float()}
    turned |= {name: -tensors[name] for name in SIGMA if negate and name in tensors}
    return {**tensors, **turned}


def _projectors(tensors: Mapping[str, Tensor], width: int, path: object) -> nn.ModuleList:
    """REPA's three-layer heads."""
    own = {k.removeprefix("projectors."): v.float().clone() for k, v in tensors.items()}
    sizes = [
        [own[f"{n}.{layer}.bias"].numel() if f"{n}.{layer}.bias" in own else 0 for layer in (0, 4)]
        for n in range(len({key.partition(".")[0] for key in own}))
    ]
    with torch.device("meta"):  # sizes from a file take no memory before they fit
        heads = nn.ModuleList(Projector(width, *hidden_and_dim) for hidden_and_dim in sizes)
    if problems := misfit(own, heads.state_dict()):
        raise CheckpointError(
            f"{path}: no three-layer projector ({problems}); give projectors=False to leave it out"
        )
    heads.load_state_dict(own, assign=True)
    return heads


def _download(repo: str, revision: str | None) -> Path:
    """The readable files of a repository in the hub's local cache."""
    if not REPO.fullmatch(repo):
        raise CheckpointError(f"no folder {repo}, and that is no owner/name on the hub")
    from huggingface_hub import snapshot_download

    files = [METADATA, *EXPORTED, "vae/config.json", f"vae/{FOLDER_FILE}"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:  # network, gate and disk raise many types
        raise CheckpointError(
            f"there is no folder {repo}, and the hub's cannot be fetched: {one_line(error)}"
        ) from error
