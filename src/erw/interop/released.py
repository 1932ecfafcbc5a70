"""A released file: its tensors by our names, and the settings that its shapes, its arguments and
its layout say."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.config import Flow, Model, Run, Sample
from erw.errors import CheckpointError, ConfigError
from erw.interop.layouts import (
    LAST,
    LAYOUTS,
    TABLE,
    TIMES,
    depth_of,
    detect_layout,
    from_layout,
    positions,
    unshifted,
)
from erw.interop.safe_load import Which, read_weights
from erw.io import misfit
from erw.models import SiT, build_model
from erw.models.sit import SIZES
from erw.plan import PRESETS

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
    """A released file by our names, as stored: nothing is cast, turned or dropped.

    `outputs`: numbers that the network gives for each one of the latent. `optional`: parameters
    that a warm-up's file lacks. `origin`: what was read, in words.
    """

    layout: str
    run: Run
    net: dict[str, Tensor]
    projectors: dict[str, Tensor]
    buffers: dict[str, Tensor]
    outputs: int
    optional: frozenset[str]
    origin: str


def read_released(
    path: str | Path, layout: str = "auto", *, which: Which = "ema", num_heads: int | None = None,
    input_size: int | None = None, depth: int | None = None, prediction: str | None = None,
    path_type: str | None = None,
) -> Released:  # fmt: skip
    """The checked contents of a released file; arguments and errors as for `load_pretrained`."""
    if layout not in ("auto", *LAYOUTS):
        raise ConfigError(f"layout is {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    weights, evidence = read_weights(path, which=which), "as given"
    settings = weights.settings
    if layout == "auto":
        layout, evidence = detect_layout(weights, path)
    if layout == "diffusers-dit":  # its folder's config.json says them
        num_heads = num_heads or settings.get("num_attention_heads")
        input_size = input_size or settings.get("sample_size")
    net, projectors, buffers = from_layout(weights.tensors, layout, path)
    sample = LIGHTNING if layout == "lightningdit" else Sample()
    if TIMES[layout] == "steps":
        if prediction or path_type:
            raise ConfigError(f"{path} is a DiT, which predicts noise on its chain; say no other")
        flow, sample = Flow(objective="ddpm"), DIT
    else:
        predicts = _known(path, settings, "prediction", PREDICTIONS, prediction)
        along = _known(path, settings, "path_type", PATHS, path_type)
        flow = Flow(prediction=predicts, path=along)  # type: ignore[arg-type]
    model = infer_model(
        net, buffers, path, num_heads=num_heads, depth=depth, input_size=input_size
    )
    outputs, optional, warm = flow.outputs, frozenset[str](), LAST not in net
    if warm:
        late = ("final_layer.", *(f"blocks.{n}." for n in range(depth_of(net), model.depth)))
        with torch.device("meta"):
            names = dict(build_model(model).named_parameters())
        optional = frozenset(name for name in names if name.startswith(late))
    elif _shape(net, LAST, 2, path)[0] == 2 * (model.channels or 0) * model.patch**2:
        outputs = 2  # a flow model's file may have sigma channels
    shape = check_fit(model, outputs, net, path, optional=optional)
    if not check_positions(shape, buffers, path):
        buffers = {}
    words = [f"{layout} ({evidence}): {_words(model)}"]
    words += [f"weights {weights.wrapper}"] * bool(weights.wrapper)
    words += ["sigma channels dropped"] * (outputs > flow.outputs)
    if warm:
        words.append(f"warm start: blocks 1 to {depth_of(net)} from the file, the rest is new")
    origin, name = ", ".join(words + unusual(flow)), Path(path).stem
    run = Run(name=name, model=model, flow=flow, plan=PRESETS["sit"], sample=sample)
    return Released(layout, run, net, projectors, buffers, outputs, optional, origin)


def infer_model(
    net: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    path: object,
    *,
    num_heads: int | None = None,
    depth: int | None = None,
    input_size: int | None = None,
) -> Model:
    """A network's settings from a file's tensors; the options fill in what shapes cannot say.

    Raises:
        CheckpointError: something is unknown and was not given, or what was given contradicts.
    """
    width, channels, patch, _ = _shape(net, "x_embedder.proj.weight", 4, path)
    rows, _ = _shape(net, TABLE, 2, path)
    class_token = "cls_projectors2.weight"
    token = _shape(net, class_token, 2, path)[1] if class_token in net else 0
    depth = depth or (depth_of(net) if LAST in net else DEPTHS.get(width))
    if depth is None:
        raise CheckpointError(
            f"{path} has no final layer (a warm-up), and width {width} does not say how deep the "
            "full model is: give depth="
        )
    return Model(
        input_size=input_size or _grid(buffers, path, extra=token > 0) * patch,
        channels=channels,
        patch=patch,
        depth=depth,
        width=width,
        heads=_heads(net, buffers, width, num_heads, path),
        num_classes=rows - 1,
        rope="feat_rope.freqs_cos" in buffers,
        qk_norm="blocks.0.attn.q_norm.weight" in net,
        norm="rms" if "blocks.0.norm1.weight" in net else "layer",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in net else "gelu",
        adaln_shift=not unshifted(net),
        class_token="denoised" if token else "none",
        class_dim=token or None,
    )


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
    side, channels = model.input_size or 0, model.channels or 0
    classes = -1 if model.num_classes is None else model.num_classes
    if (
        model.net != "sit"
        or min(side, channels, model.patch, classes + 1) < 1
        or (side // model.patch) ** 2 * model.width > MOST_POSITIONS
        or (model.depth != depth_of(tensors) and not optional)
    ):
        raise CheckpointError(
            f"{source} has {depth_of(tensors)} blocks, its settings are for a {model.net} of "
            f"{model.depth} and {classes} classes on {side} x {side} x {channels}: not of one model"
        )
    with torch.device("meta"):
        net: SiT = build_model(model, outputs=outputs)
    if problems := misfit(tensors, dict(net.named_parameters()), optional=optional):
        raise CheckpointError(
            f"{source} does not fit a {model.depth} x {model.width} network: {problems}"
        )
    return net


def check_positions(net: SiT, buffers: Mapping[str, Tensor], path: object) -> bool:
    """Whether the positions stored in a file are for the network's resolution.

    Raises:
        CheckpointError: they are, but have other values than ours: not the frozen tables.
    """
    rows = net.grid**2 + (net.class_token > 0)
    if "pos_embed" in buffers and buffers["pos_embed"].shape[1] != rows:
        return False
    for name, ours in positions(net).items():
        theirs = buffers.get(name, ours)
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=1e-4):
            raise CheckpointError(f"{path}: {name} is not the frozen table, which erw's model has")
    return True


def unusual(flow: Flow) -> list[str]:
    """What a flow model has other than the velocity on the linear path, in words."""
    words = [f"predicts the {flow.prediction}"] * (flow.prediction != "velocity")
    return words + [f"{flow.path} path"] * (flow.path != "linear")


def _known(
    path: object, settings: dict[str, Any], key: str, names: dict[str, str], argument: str | None
) -> str:
    """Our name for what the file or the user says; SiT's default where neither does."""
    sources = {"it says": settings.get(key), "you say": argument}
    values = {who: str(value).lower() for who, value in sources.items() if value is not None}
    for who, value in values.items():
        if value not in names:
            raise CheckpointError(f"{path}: {who} {key} {value!r}; known: {', '.join(names)}")
    meanings = {names[value] for value in values.values()} or {next(iter(names.values()))}
    if len(meanings) > 1:
        raise CheckpointError(
            f"{path} says {key} {values['it says']}, you say {values['you say']}; leave {key} out"
        )
    return meanings.pop()


def _heads(net: Mapping, buffers: Mapping, width: int, given: int | None, path: object) -> int:
    """Attention heads: as QK-norm and RoPE tables show, as given, or as usual for the width."""
    tables = net.get("blocks.0.attn.q_norm.weight"), buffers.get("feat_rope.freqs_cos")
    shown = [width // t.shape[-1] for t in tables if t is not None and t.ndim and t.numel()]
    heads = next(iter(shown), given or HEADS.get(width))
    if heads is None:
        known = ", ".join(f"{w}: {h}" for w, h in HEADS.items())
        raise CheckpointError(
            f"{path} has width {width}, for which the number of heads is not known ({known}); give "
            "num_heads="
        )
    if given not in (None, heads):
        raise CheckpointError(f"{path} has {heads} heads by its shapes; num_heads is {given}")
    if heads < 1 or width % heads:
        raise CheckpointError(f"{path} has width {width}, which {heads} heads do not divide")
    return heads


def _grid(buffers: Mapping[str, Tensor], path: object, *, extra: int) -> int:
    """Tokens along a side, from the stored positions; `extra` of them are not of patches."""
    if "pos_embed" not in buffers:
        raise CheckpointError(f"{path} stores no positions; give input_size=, the latent's side")
    tokens = _shape(buffers, "pos_embed", 3, path)[1] - extra
    if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise CheckpointError(f"{path}: pos_embed has {tokens} tokens, which are no square grid")
    return math.isqrt(tokens)


def _shape(tensors: Mapping[str, Tensor], key: str, ndim: int, path: object) -> tuple[int, ...]:
    shape = tuple(tensors[key].shape) if key in tensors else ()
    if len(shape) != ndim or 0 in shape:
        raise CheckpointError(f"{path} does not fit: {key} is missing or has a wrong shape {shape}")
    return shape


def _words(model: Model) -> str:
    """The sizes of a network."""
    words = [
        f"{model.depth} x {model.width}, {model.heads} heads, patch {model.patch}",
        f"latents {model.channels} x {model.input_size} x {model.input_size}",
        f"{model.num_classes} classes",
    ]
    words += [f"class token of {model.class_dim}"] * bool(model.class_dim)
    words += [name for name in ("rope", "qk_norm") if getattr(model, name)]
    words += [name for name in (model.norm, model.mlp) if name in ("rms", "swiglu")]
    return ", ".join(words)
