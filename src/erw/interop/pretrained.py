"""Released checkpoints, exported folders and runs as one kind of model, `Trained`: t = 0 is data,
and a flow model gives the velocity noise - data, whatever its file's network predicts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw.align import Projector
from erw.config import Flow, Model, Run, Sample
from erw.errors import CheckpointError, ConfigError, one_line
from erw.interop import layouts
from erw.interop.layouts import FLIPPED, LAST, LAYOUTS, SIGMA, STEPS, TABLE, TIMES, depth_of
from erw.interop.metadata import METADATA, read_metadata
from erw.interop.safe_load import FOLDER_FILE, Which, read_weights
from erw.io import misfit
from erw.models import SiT, build_model
from erw.models.sit import SIZES
from erw.plan import PRESETS
from erw.training.trained import Trained, is_run, load

FILES = (".pt", ".pth", ".bin", ".safetensors")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_FILE = "model.safetensors"
EXPORTED = (f"transformer/{FOLDER_FILE}", PLAIN_FILE)
OPTIONS = ("rope", "qk_norm", "norm", "mlp", "adaln_shift", "class_token")
VAES = {4: "sd-vae-ft-ema", 32: "va-vae"}  # by latent channels
HEADS = {width: heads for _, width, heads in SIZES.values()}
DEPTHS = {width: depth for depth, width, _ in SIZES.values()}
# The peers' names for ours; the first is SiT's default.
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine", "vp": "vp"}
PREDICTIONS = {"v": "velocity"} | {name: name for name in ("velocity", "noise", "score", "x")}
# LightningDiT counts time the other way: timestep_shift 0.3, no guidance below 0.11, 250 points.
LIGHTNING = Sample(
    steps=249, solver="euler", shift=1 / 0.3, interval=(0.0, 0.89), guided_channels=3
)
DIT = Sample(steps=250, solver="ddpm", guided_channels=3)
MOST_POSITIONS = 2**28  # numbers in the table of positions: far above any model there is


@dataclass(frozen=True)
class Released:
    """A released file by our names, as stored: nothing is cast, turned or dropped. It has `outputs`
    numbers for each one of the latent; a warm-up lacks the `optional` parameters."""

    layout: str
    run: Run
    net: dict[str, Tensor]
    projectors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    outputs: int
    optional: frozenset[str]
    origin: str


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
        layout: of `LAYOUTS`; "auto" detects it, and asks where two layouts look the same.
        projectors: False drops the alignment heads.
        options: what the file does not say, see `read_released`.

    Raises:
        FileNotFoundError, CheckpointError: missing, damaged, hostile, ambiguous, or not this
            layout's; missing, unexpected and mis-shaped keys are listed.
    """
    file = read_released(path, layout, **options)
    tensors, run = file.net, file.run
    if file.outputs > run.flow.outputs:
        tensors = layouts.without_sigma(tensors)
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
    """A model that `erw.export` or `erw.push_to_hub` wrote: a folder, or "owner/name" on the hub
    (`revision`: branch, tag or commit). Only safetensors and JSON are fetched; no code is run.

    Raises:
        CheckpointError: no such folder or repository, no connection, or an incomplete export.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _download(str(source), revision)
    meta = read_metadata(folder)
    run, names, (file, plain) = meta.run, meta.class_names, (folder / name for name in EXPORTED)
    file = file if file.is_file() else plain
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
    checkpoint, which `options` say how to read (see `load_pretrained`). Raises as those.

    Raises:
        ConfigError: options or a checkpoint for what has none.
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


def read_released(
    path: str | Path, layout: str = "auto", *, which: Which = "ema", num_heads: int | None = None,
    input_size: int | None = None, depth: int | None = None, prediction: str | None = None,
    path_type: str | None = None,
) -> Released:  # fmt: skip
    """The checked contents of a released file, as stored; errors as for `load_pretrained`.

    Args:
        which: averaged ("ema") or plain weights ("model") of a training checkpoint.
        num_heads: attention heads, where neither the width nor the shapes say it.
        input_size: side of the latent; for another than the file's, positions are computed anew.
        depth: blocks of the full model, for a warm-up's file; the others are `Trained.missing`.
        prediction: of a flow model's network, "velocity" (default), "noise", "score" or "x".
        path_type: it was trained on: "linear" (default), "cosine" (SiT's GVP) or "vp".
    """
    if layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"layout is {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    weights, evidence = read_weights(path, which=which), "as given"
    settings = weights.settings
    if layout == "auto":
        layout, evidence = layouts.detect_layout(weights, path)
    if layout == "diffusers-dit":  # its folder's config.json says them
        num_heads = num_heads or settings.get("num_attention_heads")
        input_size = input_size or settings.get("sample_size")
    net, projectors, buffers = layouts.from_layout(weights.tensors, layout, path)
    sample = LIGHTNING if layout == "lightningdit" else Sample()
    if TIMES[layout] == STEPS:
        if prediction or path_type:
            raise ConfigError(f"{path} is a DiT, which predicts noise on its chain; say no other")
        flow, sample = Flow(objective="ddpm"), DIT
    else:
        predicts = _known(path, settings, "prediction", PREDICTIONS, prediction)
        along = _known(path, settings, "path_type", PATHS, path_type)
        flow = Flow(prediction=predicts, path=along)  # type: ignore[arg-type]
    model = _model(net, buffers, path, heads=num_heads, depth=depth, input_size=input_size)
    outputs, optional = flow.outputs, frozenset[str]()
    if LAST not in net:
        late = ("final_layer.", *(f"blocks.{n}." for n in range(depth_of(net), model.depth)))
        with torch.device("meta"):
            names = dict(build_model(model).named_parameters())
        optional = frozenset(name for name in names if name.startswith(late))
    elif net[LAST].numel() == 2 * net["x_embedder.proj.weight"].numel():
        outputs = 2  # a flow model's file may have sigma channels
    shape = check_fit(net, model, outputs=outputs, source=path, optional=optional)
    if not _has_positions(shape, buffers, path):
        buffers = {}
    plain, side = Model(), f"{model.input_size} x {model.input_size}"
    words = [
        f"{layout} ({evidence}): {model.depth} x {model.width}, {model.heads} heads, "
        f"patch {model.patch}, latents {model.channels} x {side}, {model.num_classes} classes"
    ]
    options = {name: getattr(model, name) for name in (*OPTIONS, "class_dim")}
    words += [f"{k} {v}" for k, v in options.items() if v != getattr(plain, k)]
    words += [f"weights {weights.wrapper}"] * bool(weights.wrapper)
    words += ["sigma channels dropped"] * (outputs > flow.outputs)
    if optional:
        words.append(f"warm start: blocks 1 to {depth_of(net)} from the file, the rest is new")
    origin, name = ", ".join(words + unusual(flow)), Path(path).stem
    run = Run(name=name, model=model, flow=flow, plan=PRESETS["sit"], sample=sample)
    return Released(layout, run, net, projectors, buffers, outputs, optional, origin)


def check_fit(
    tensors: Mapping[str, Tensor], model: Model, *, outputs: int, source: Any, optional: Any = ()
) -> SiT:
    """The network that the tensors fit, on the meta device: settings from a file are checked before
    they take memory. `optional`: parameters that may be missing. Raises CheckpointError."""
    side, channels, blocks = model.input_size or 0, model.channels or 0, depth_of(tensors)
    classes = -1 if model.num_classes is None else model.num_classes
    if (
        model.net != "sit"
        or min(side, channels, classes + 1) < 1
        or (side // model.patch) ** 2 * model.width > MOST_POSITIONS
        or (model.depth != blocks and not optional)
    ):
        raise CheckpointError(
            f"{source} has {blocks} blocks, its settings are for a {model.net} of {model.depth} "
            f"and {classes} classes on {side} x {side} x {channels}: not of one model"
        )
    with torch.device("meta"):
        net: SiT = build_model(model, outputs=outputs)
    if problems := misfit(tensors, dict(net.named_parameters()), optional=optional):
        raise CheckpointError(
            f"{source} does not fit a {model.depth} x {model.width} network: {problems}"
        )
    return net


def unusual(flow: Flow) -> list[str]:
    """What a flow model has other than the velocity on the linear path, in words."""
    words = [f"predicts the {flow.prediction}"] * (flow.prediction != "velocity")
    return words + [f"{flow.path} path"] * (flow.path != "linear")


def _model(
    net: Any, buffers: Any, path: Any, *, heads: int | None, depth: int | None, input_size: Any
) -> Model:
    """A network's settings from a file's tensors; the options fill in what shapes cannot say."""
    token = "cls_projectors2.weight"
    tables = net.get("blocks.0.attn.q_norm.weight"), buffers.get("feat_rope.freqs_cos")
    try:
        width, channels, patch, _ = net["x_embedder.proj.weight"].shape
        classes, class_dim = len(net[TABLE]) - 1, net[token].shape[1] if token in net else None
        tokens = buffers["pos_embed"].shape[1] - (token in net) if "pos_embed" in buffers else 0
        shown = next((width // t.shape[-1] for t in tables if t is not None), heads)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} does not fit: {one_line(error)}") from error
    side, shown = math.isqrt(max(tokens, 0)), shown or HEADS.get(width)
    depth = depth or (depth_of(net) if LAST in net else DEPTHS.get(width))
    input_size = input_size or side * patch
    for option, value in {"num_heads": shown, "depth": depth, "input_size": input_size}.items():
        if not value:
            raise CheckpointError(f"{path} of width {width} does not say it: give {option}=")
    assert shown and depth
    if side**2 != tokens or heads not in (None, shown):
        raise CheckpointError(
            f"{path} has {tokens} tokens (a square is usual) and {shown} heads; num_heads: {heads}"
        )
    return Model(
        input_size=input_size,
        channels=channels,
        patch=patch,
        depth=depth,
        width=width,
        heads=shown,
        num_classes=classes,
        rope="feat_rope.freqs_cos" in buffers,
        qk_norm="blocks.0.attn.q_norm.weight" in net,
        norm="rms" if "blocks.0.norm1.weight" in net else "layer",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in net else "gelu",
        adaln_shift=not layouts.unshifted(net),
        class_token="denoised" if class_dim else "none",
        class_dim=class_dim,
    )


def _has_positions(net: SiT, buffers: Mapping[str, Tensor], path: object) -> bool:
    """Whether the positions stored in a file are for the network's resolution; refuses others than
    the frozen tables."""
    rows = net.grid**2 + (net.class_token > 0)
    if "pos_embed" in buffers and buffers["pos_embed"].shape[1] != rows:
        return False
    for name, ours in layouts.positions(net).items():
        theirs = buffers.get(name, ours)
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-4):
            raise CheckpointError(f"{path}: {name} is not the frozen table, which erw's model has")
    return True


def _known(
    path: object, settings: dict[str, Any], key: str, names: dict[str, str], argument: str | None
) -> str:
    """Our name for what the file or the user says; SiT's default where neither does."""
    values = [value for value in (settings.get(key), argument) if value is not None]
    meanings = {names.get(str(value).lower()) for value in values}
    if len(meanings) > 1 or None in meanings:
        raise CheckpointError(
            f"{path}: {key} is {' in the file, as argument '.join(map(str, values))}; expected one "
            f"of {', '.join(names)}"
        )
    return (meanings.pop() if values else None) or next(iter(names.values()))


def in_our_time(tensors: Mapping[str, Tensor], *, negate: bool) -> dict[str, Tensor]:
    """The weights of net(x, 1 - t), or of its negative, from those of net(x, t), up to rounding.

    The sinusoids of 1 - t are a fixed rotation and reflection of those of t, which the first layer
    of the time embedding absorbs. The last layer changes the sign of a velocity.
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
