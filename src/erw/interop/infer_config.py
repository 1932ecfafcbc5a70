"""Sizes and options of a released network from the shapes in its file, and the settings of its run
from what the file or its layout says."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.config import Flow, Model, Run, Sample
from erw.errors import CheckpointError, ConfigError
from erw.interop.layouts import TIMES, Parts, depth_of, positions, unshifted
from erw.models import SiT
from erw.models.sit import SIZES
from erw.plan import PRESETS

HEADS = {width: heads for _, width, heads in SIZES.values()}
DEPTHS = {width: depth for depth, width, _ in SIZES.values()}
# The peers' names for ours.
PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine", "vp": "vp"}
PREDICTIONS = {"v": "velocity"} | {name: name for name in ("velocity", "noise", "score", "x")}
VAES = {4: "sd-vae-ft-ema", 32: "va-vae"}  # by latent channels
# LightningDiT counts time the other way: timestep_shift 0.3, no guidance below 0.11, 250 points.
LIGHTNING = Sample(
    steps=249, solver="euler", shift=1 / 0.3, interval=(0.0, 0.89), guided_channels=3
)
DIT = Sample(steps=250, solver="ddpm", guided_channels=3)


def infer_model(
    parts: Parts,
    path: object,
    *,
    num_heads: int | None = None,
    depth: int | None = None,
    input_size: int | None = None,
) -> tuple[Model, int]:
    """A network's settings from a file's tensors, and how many outputs it has for each number of
    the latent; the options fill in what shapes cannot say.

    Raises:
        CheckpointError: something is unknown and was not given, or what was given contradicts.
    """
    net, buffers = parts.net, parts.buffers
    width, channels, patch, _ = _shape(net, "x_embedder.proj.weight", 4, path)
    rows, _ = _shape(net, "y_embedder.embedding_table.weight", 2, path)
    class_token = "cls_projectors2.weight"
    token = _shape(net, class_token, 2, path)[1] if class_token in net else 0
    blocks, whole = depth_of(net), "final_layer.linear.weight" in net
    if whole and depth not in (None, blocks):
        raise CheckpointError(
            f"{path} has {blocks} blocks and a final layer; leave out depth={depth}"
        )
    if not whole and depth is None and width not in DEPTHS:
        raise CheckpointError(
            f"{path} holds {blocks} blocks and no final layer (a warm-up); width {width} does not "
            "say how deep the full model is: give depth="
        )
    last = _shape(net, "final_layer.linear.weight", 2, path)[0] if whole else channels * patch**2
    if last % (channels * patch**2):
        raise CheckpointError(f"{path} gives {last} numbers a patch for {channels} latent channels")
    model = Model(
        input_size=input_size or _grid(buffers, path, extra=token > 0) * patch,
        channels=channels,
        patch=patch,
        depth=blocks if whole else depth or DEPTHS[width],
        width=width,
        heads=_heads(parts, width, num_heads, path),
        num_classes=rows - 1,
        rope="feat_rope.freqs_cos" in buffers,
        qk_norm="blocks.0.attn.q_norm.weight" in net,
        norm="rms" if "blocks.0.norm1.weight" in net else "layer",
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in net else "gelu",
        adaln_shift=not unshifted(net),
        class_token="denoised" if token else "none",
        class_dim=token or None,
    )
    return model, last // (channels * patch**2)


def infer_run(
    path: object,
    model: Model,
    settings: dict[str, Any],
    layout: str,
    *,
    prediction: str | None = None,
    path_type: str | None = None,
) -> Run:
    """What is known of a released model as a run's settings.

    Raises:
        CheckpointError: the file's prediction or path is unknown, or contradicts the argument.
        ConfigError: prediction or path is given for a DiT, which has its own.
    """
    sample = LIGHTNING if layout == "lightningdit" else Sample()
    if TIMES[layout] == "steps":
        if prediction or path_type:
            raise ConfigError(f"{path} is a DiT, which predicts noise on its chain; say no other")
        flow, sample = Flow(objective="ddpm"), DIT
    else:
        flow = Flow(
            prediction=_known(path, settings, "prediction", PREDICTIONS, prediction),  # type: ignore[arg-type]
            path=_known(path, settings, "path_type", PATHS, path_type),  # type: ignore[arg-type]
        )
    return Run(
        name=Path(str(path)).stem, model=model, flow=flow, plan=PRESETS["sit"], sample=sample
    )


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
            raise CheckpointError(
                f"{path}: {name} is not the frozen table of {net.grid} x {net.grid} positions that "
                "this layout has; erw's model cannot use it"
            )
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
    meanings = {names[value] for value in values.values()}
    if len(meanings) > 1:
        raise CheckpointError(
            f"{path} says {key} {values['it says']}, you say {values['you say']}; leave {key} out"
        )
    return meanings.pop() if meanings else next(iter(names.values()))


def _heads(parts: Parts, width: int, given: int | None, path: object) -> int:
    """Attention heads: as QK-norm and RoPE tables show, as given, or as usual for the width."""
    tables = (
        parts.net.get("blocks.0.attn.q_norm.weight"),
        parts.buffers.get("feat_rope.freqs_cos"),
    )
    inferred = [width // table.shape[-1] for table in tables if table is not None and table.ndim]
    if given is not None and any(given != heads for heads in inferred):
        raise CheckpointError(f"{path} has {inferred[0]} heads by its shapes; num_heads is {given}")
    heads = next(iter(inferred), given or HEADS.get(width))
    if heads is None:
        known = ", ".join(f"{w}: {h}" for w, h in HEADS.items())
        raise CheckpointError(
            f"{path} has width {width}, for which the number of heads is not known ({known}); give "
            "num_heads="
        )
    if heads < 1 or width % heads:
        raise CheckpointError(f"{path} has width {width}, which {heads} heads do not divide")
    return heads


def _grid(buffers: Mapping[str, Tensor], path: object, *, extra: int) -> int:
    """Tokens along a side, from the stored positions; `extra` of them are not of patches."""
    if "pos_embed" not in buffers or buffers["pos_embed"].ndim != 3:
        raise CheckpointError(f"{path} stores no positions; give input_size=, the latent's side")
    tokens = buffers["pos_embed"].shape[1] - extra
    if math.isqrt(tokens) ** 2 != tokens:
        raise CheckpointError(f"{path}: pos_embed has {tokens} tokens, which are no square grid")
    return math.isqrt(tokens)


def _shape(net: Mapping[str, Tensor], key: str, ndim: int, path: object) -> tuple[int, ...]:
    if key not in net:
        raise CheckpointError(f"{path} does not fit: 1 missing: {key}")
    shape = tuple(net[key].shape)
    if len(shape) != ndim or min(shape) < 1:
        raise CheckpointError(
            f"{path}: {key} has shape {shape}; expected {ndim} sizes of 1 or more"
        )
    return shape
