"""Released checkpoints, exported folders and runs as one kind of model, `Trained`: t = 0 is data,
and a flow model gives the velocity noise - data, whatever its file's network predicts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw.align import Projector
from erw.config import Model, Run, to_dict
from erw.errors import CheckpointError, ConfigError, one_line
from erw.interop.infer_config import VAES, check_positions, infer_model, infer_run, unusual
from erw.interop.layouts import (
    LAYOUTS,
    TIMES,
    Parts,
    depth_of,
    detect_layout,
    from_layout,
    without_sigma,
)
from erw.interop.metadata import METADATA, read_metadata
from erw.interop.safe_load import FOLDER_FILE, Which, read_weights
from erw.io import misfit
from erw.models import SiT, build_model
from erw.training.trained import Trained, is_run, load

FILES = (".pt", ".pth", ".bin", ".safetensors")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_FILE = "model.safetensors"
EXPORTED = (f"transformer/{FOLDER_FILE}", PLAIN_FILE)
MOST_POSITIONS = 2**28  # numbers in the table of positions: far above any model there is
TABLE = "y_embedder.embedding_table.weight"


class Released(NamedTuple):
    """A released file by our names, as stored: nothing is cast, turned or dropped.

    `outputs`: numbers that the network gives for each one of the latent. `optional`: parameters
    that a warm-up's file lacks. `origin`: what was read, in words.
    """

    layout: str
    parts: Parts
    run: Run
    outputs: int
    optional: frozenset[str]
    origin: str


def load_pretrained(
    path: str | Path,
    layout: str = "auto",
    *,
    num_heads: int | None = None,
    which: Which = "ema",
    input_size: int | None = None,
    depth: int | None = None,
    projectors: bool = True,
    prediction: str | None = None,
    path_type: str | None = None,
    device: torch.device | str = "cpu",
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
        num_heads: attention heads, where neither the width nor the shapes say it.
        which: averaged ("ema") or plain weights ("model") of a training checkpoint.
        input_size: side of the latent, where it should be another than the file's; positions are
            computed anew.
        depth: blocks of the full model, for a warm-up's file without its last blocks; those start
            fresh and are listed in `Trained.missing`.
        projectors: False drops the alignment heads.
        prediction: output of a flow model's network, "velocity", "noise", "score" or "x", where
            the file does not say it; default: velocity.
        path_type: the path it was trained on, "linear", "cosine" (SiT's GVP) or "vp", likewise.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, hostile, ambiguous, or not this layout's; missing, unexpected and
            mis-shaped keys are listed.
    """
    file = read_released(
        path, layout, which=which, num_heads=num_heads, input_size=input_size, depth=depth,
        prediction=prediction, path_type=path_type,
    )  # fmt: skip
    tensors, run = file.parts.net, file.run
    if file.outputs > run.flow.outputs:
        tensors = without_sigma(tensors)
    if TIMES[file.layout] == "flipped":
        tensors = in_our_time(tensors, negate=run.flow.prediction == "velocity")
    model = build_model(run.model, outputs=run.flow.outputs)
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    heads = _projectors(file.parts.projectors if projectors else {}, model.width, path)
    vae = VAES.get(model.channels, f"a VAE of {model.channels} channels")
    origin = file.origin + f", {len(heads)} projector(s)" * bool(heads)
    trained = Trained(
        model, run, vae, source=str(path), projectors=heads, missing=file.optional, origin=origin
    )
    for module in (model, heads):
        module.to(device).eval().requires_grad_(False)
    return trained


def read_released(
    path: str | Path, layout: str = "auto", *, which: Which = "ema", num_heads: int | None = None,
    input_size: int | None = None, depth: int | None = None, prediction: str | None = None,
    path_type: str | None = None,
) -> Released:  # fmt: skip
    """The checked contents of a released file; arguments and errors as for `load_pretrained`."""
    if layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"layout is {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    weights = read_weights(path, which=which)
    evidence = "as given"
    if layout == "auto":
        layout, evidence = detect_layout(weights, path)
    if layout == "diffusers-dit":  # its folder's config.json says them
        num_heads = num_heads or weights.settings.get("num_attention_heads")
        input_size = input_size or weights.settings.get("sample_size")
    parts = from_layout(weights.tensors, layout, path)
    model, outputs = infer_model(
        parts, path, num_heads=num_heads, depth=depth, input_size=input_size
    )
    optional = frozenset[str]()
    if "final_layer.linear.weight" not in parts.net:  # a warm-up
        blocks = range(depth_of(parts.net), model.depth)
        late = ("final_layer.", *(f"blocks.{block}." for block in blocks))
        with torch.device("meta"):
            names = dict(build_model(model).named_parameters())
        optional = frozenset(name for name in names if name.startswith(late))
    net = check_fit(model, outputs, parts.net, path, optional=optional)
    if not check_positions(net, parts.buffers, path):
        parts = parts._replace(buffers={})
    run = infer_run(
        path, model, weights.settings, layout, prediction=prediction, path_type=path_type
    )
    if outputs not in (run.flow.outputs, 2):  # a flow model's file may have sigma channels
        raise CheckpointError(
            f"{path} gives {outputs * model.channels} channels for latents of {model.channels}, "  # type: ignore[operator]
            f"which is not what a {layout} file does"
        )
    words = [f"{layout} ({evidence}): {_words(model)}"]
    words += [f"weights {weights.wrapper}"] * bool(weights.wrapper)
    words += ["sigma channels dropped"] * (outputs > run.flow.outputs)
    if optional:
        words.append(
            f"warm start: blocks 1 to {depth_of(parts.net)} from the file, the rest is new"
        )
    words += unusual(run.flow)
    return Released(layout, parts, run, outputs, optional, ", ".join(words))


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
    file = next((folder / name for name in EXPORTED if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no {' or '.join(EXPORTED)}; get it again")
    tensors = {k.removeprefix("net."): v for k, v in read_weights(file).tensors.items()}
    if any(name.startswith("transformer_blocks.") for name in tensors):
        # An export of an older erw for DiTPipeline, whose label table has 1,000 classes.
        tensors = from_layout(tensors, "diffusers-dit", file).net
        tensors[TABLE] = torch.cat([tensors[TABLE][: run.model.num_classes], tensors[TABLE][-1:]])
    check_fit(run.model, run.flow.outputs, tensors, file)
    net: SiT = build_model(run.model, outputs=run.flow.outputs)
    net.load_state_dict(tensors)
    net.to(device).eval().requires_grad_(False)
    if names and len(names) != net.null_class:
        raise CheckpointError(
            f"{folder / METADATA} names {len(names)} classes, the weights have {net.null_class}"
        )
    vae, scaling = meta.vae, to_dict(meta.scaling) if meta.scaling else None
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
    turned = dict(tensors)
    first = tensors["t_embedder.mlp.0.weight"].double()
    cos, sin = first.chunk(2, dim=1)
    half = cos.shape[1]
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=first.device) / half)
    c, s = omega.cos(), omega.sin()
    turned["t_embedder.mlp.0.weight"] = torch.cat([cos * c + sin * s, cos * s - sin * c], 1).float()
    for kind in ("weight", "bias"):
        if negate and (name := f"final_layer.linear.{kind}") in turned:
            turned[name] = -turned[name]
    return turned


def check_fit(
    model: Model,
    outputs: int,
    tensors: Mapping[str, Tensor],
    source: object,
    *,
    optional: frozenset[str] = frozenset(),
) -> SiT:
    """The network that the tensors fit, on the meta device: settings from a file are checked before
    they take memory.

    Raises:
        CheckpointError: lists what is missing, unexpected and of another shape.
    """
    side, channels, classes = model.input_size, model.channels, model.num_classes
    if side is None or channels is None or classes is None or min(side, channels, classes + 1) < 1:
        raise CheckpointError(f"{source}: its settings do not say the latent's size or the classes")
    blocks, positions = depth_of(tensors), (side // model.patch) ** 2 * model.width
    if model.net != "sit" or positions > MOST_POSITIONS or (model.depth != blocks and not optional):
        raise CheckpointError(
            f"{source} has {blocks} blocks, its settings are for a {model.net} of {model.depth} on "
            f"{side} x {side}: not of one model; get it again"
        )
    with torch.device("meta"):
        net: SiT = build_model(model, outputs=outputs)
    if problems := misfit(tensors, dict(net.named_parameters()), optional=optional):
        raise CheckpointError(
            f"{source} does not fit a {model.depth} x {model.width} network: {problems}"
        )
    return net


def _projectors(tensors: Mapping[str, Tensor], width: int, path: object) -> nn.ModuleList:
    """REPA's three-layer heads."""
    heads = nn.ModuleList()
    left = dict(tensors)
    while any(key.startswith(f"projectors.{len(heads)}.") for key in left):
        stem = f"projectors.{len(heads)}."
        own = {k.removeprefix(stem): left.pop(k).float() for k in list(left) if k.startswith(stem)}
        hidden, dim = (own[k].numel() if k in own else 0 for k in ("0.bias", "4.bias"))
        head = Projector(width, hidden, dim)
        if misfit(own, head.state_dict()):
            raise CheckpointError(
                f"{path}: {stem}* is no three-layer projector ({', '.join(list(own)[:4])}); give "
                "projectors=False to leave it out"
            )
        head.load_state_dict(own)
        heads.append(head)
    if left:
        raise CheckpointError(f"{path}: projectors are not numbered from 0: {', '.join(left)}")
    return heads


def _words(model: Model) -> str:
    """Sizes and options of a network, in one line."""
    side = model.input_size
    words = [
        f"{model.depth} x {model.width}, {model.heads} heads, patch {model.patch}",
        f"latents {model.channels} x {side} x {side}, {model.num_classes} classes",
    ]
    words += [f"class token of {model.class_dim}"] * bool(model.class_dim)
    words += [name for name in ("rope", "qk_norm") if getattr(model, name)]
    words += [name for name in (model.norm, model.mlp) if name in ("rms", "swiglu")]
    return ", ".join(words)


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
            f"there is no folder {repo}, and the hub's repository of that name cannot be fetched: "
            f"{one_line(error)}; connect, log in where it asks so, or give a local folder"
        ) from error
