"""Sizes and options of a network, from the shapes in its file."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erw.errors import CheckpointError
from erw.interop.layouts import Parts, depth_of, unshifted
from erw.models.positions import rope_2d, sincos_2d
from erw.models.sit import SIZES, SiT

HEADS = {width: heads for _, width, heads in SIZES.values()}
DEPTHS = {width: depth for depth, width, _ in SIZES.values()}
TOKEN = "cls_projectors2.weight"  # of REG's class token


def measure(
    parts: Parts,
    path: object,
    *,
    num_heads: int | None = None,
    depth: int | None = None,
    input_size: int | None = None,
) -> dict[str, Any]:
    """The arguments of `SiT` for a file's tensors; what is given fills in what they cannot say.

    Raises:
        CheckpointError: something cannot be told and was not given, or what was given contradicts.
    """
    net, buffers = parts.net, parts.buffers
    width, channels, patch, _ = _sizes(net, "x_embedder.proj.weight", 4, path)
    rows, _ = _sizes(net, "y_embedder.embedding_table.weight", 2, path)
    token = _sizes(net, TOKEN, 2, path)[1] if TOKEN in net else 0
    here, whole = depth_of(net), "final_layer.linear.weight" in net
    if whole and depth not in (None, here):
        raise CheckpointError(
            f"{path} has {here} blocks and a final layer; leave out depth={depth}"
        )
    if not whole and depth is None and width not in DEPTHS:
        raise CheckpointError(
            f"{path} holds {here} blocks and no final layer (a warm-up); width {width} does not "
            "say how deep the full model is: give depth="
        )
    last = _sizes(net, "final_layer.linear.weight", 2, path)[0] if whole else channels * patch**2
    return {
        "input_size": input_size or _side(buffers, path, extra=token > 0) * patch,
        "channels": channels,
        "patch": patch,
        "depth": here if whole else depth or DEPTHS[width],
        "width": width,
        "heads": _heads(parts, width, num_heads, path),
        "num_classes": rows - 1,
        "rope": "feat_rope.freqs_cos" in buffers,
        "qk_norm": "blocks.0.attn.q_norm.weight" in net,
        "norm": "rms" if "blocks.0.norm1.weight" in net else "layer",
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in net else "gelu",
        "adaln_shift": not unshifted(net),
        "out_channels": last // patch**2,
        "class_token": token,
    }


def fitting(net: SiT, parts: Parts, path: object, *, warm: bool) -> None:
    """Hold a file's tensors to the parameters of the network that they should fill.

    `warm`: the blocks after those in the file, and the final layer, may be missing.

    Raises:
        CheckpointError: lists what is missing, unexpected and of another shape.
    """
    want = {name: p.shape for name, p in net.named_parameters()}
    have = parts.net
    there = depth_of(have)
    later = (*(f"blocks.{block}." for block in range(there, net.depth)), "final_layer.")
    missing = sorted(
        name for name in want.keys() - have.keys() if not (warm and name.startswith(later))
    )
    shapes = [
        f"{name} {tuple(have[name].shape)} not {tuple(want[name])}"
        for name in sorted(have.keys() & want.keys())
        if have[name].shape != want[name]
    ]
    unexpected = sorted(have.keys() - want.keys())
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if problems := [f"{len(v)} {k}: {_some(v)}" for k, v in found.items() if v]:
        raise CheckpointError(
            f"{path} does not fit a {net.depth} x {net.width} network: {'; '.join(problems)}"
        )


def check_buffers(net: SiT, buffers: Mapping[str, Tensor], path: object) -> bool:
    """Whether the positions stored in a file are for the network's resolution.

    Raises:
        CheckpointError: they are, and have other values than ours: not the frozen tables.
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


def positions(net: SiT) -> dict[str, Tensor]:
    """The peers' buffers for a network's resolution, by their names."""
    tables = {"pos_embed": sincos_2d(net.width, net.grid)[None]}
    if net.class_token:  # REG's first position is zeros
        tables["pos_embed"] = F.pad(tables["pos_embed"], (0, 0, 1, 0))
    if isinstance(net.rope, Tensor):
        cos, sin = rope_2d(net.rope.shape[-1], net.grid)
        tables |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return tables


def _heads(parts: Parts, width: int, given: int | None, path: object) -> int:
    """Attention heads: as QK-norm and RoPE tables show, as given, or as usual for the width."""
    sources = (
        parts.net.get("blocks.0.attn.q_norm.weight"),
        parts.buffers.get("feat_rope.freqs_cos"),
    )
    shown = [width // table.shape[-1] for table in sources if table is not None and table.ndim]
    if given is not None and any(given != heads for heads in shown):
        raise CheckpointError(f"{path} has {shown[0]} heads by its shapes; num_heads is {given}")
    heads = next(iter(shown), given or HEADS.get(width))
    if heads is None:
        known = ", ".join(f"{w}: {h}" for w, h in HEADS.items())
        raise CheckpointError(
            f"{path} has width {width}, for which the number of heads is not known ({known}); give "
            "num_heads="
        )
    if heads < 1 or width % heads:
        raise CheckpointError(f"{path} has width {width}, which {heads} heads do not divide")
    return heads


def _side(buffers: Mapping[str, Tensor], path: object, *, extra: int) -> int:
    """Tokens along a side, from the stored positions; `extra` of them are not of patches."""
    if "pos_embed" not in buffers or buffers["pos_embed"].ndim != 3:
        raise CheckpointError(f"{path} stores no positions; give input_size=, the latent's side")
    tokens = buffers["pos_embed"].shape[1] - extra
    if math.isqrt(tokens) ** 2 != tokens:
        raise CheckpointError(f"{path}: pos_embed has {tokens} tokens, which are no square grid")
    return math.isqrt(tokens)


def _sizes(net: Mapping[str, Tensor], key: str, ndim: int, path: object) -> tuple[int, ...]:
    if key not in net:
        raise CheckpointError(f"{path} does not fit: 1 missing: {key}")
    shape = tuple(net[key].shape)
    if len(shape) != ndim or min(shape) < 1:
        raise CheckpointError(
            f"{path}: {key} has shape {shape}; expected {ndim} sizes of 1 or more"
        )
    return shape


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
