"""The released layouts: what distinguishes them, and how their names map to ours.

| layout        | files of                        | time                           | names   |
| dit           | facebookresearch/DiT            | steps 0..999, noise + variance | as ours |
| diffusers-dit | diffusers DiTTransformer2DModel | as dit                         | its own |
| sit           | willisma/SiT                    | 0 is noise, data - noise       | as ours |
| lightningdit  | hustvl/LightningDiT             | as sit                         | as ours |
| repa, erw     | sihyun-yu/REPA, LINs-lab/ERW    | as ours                        | as ours |
| reg           | Martinser/REG                   | as ours                        | as ours |

"As ours" means up to buffers (`pos_embed`, `feat_rope.*`), projectors and sigma channels.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from erw.errors import CheckpointError
from erw.interop.safe_load import Weights
from erw.models import SiT
from erw.models.sit import rope_2d, sincos_2d

Layout = Literal["dit", "sit", "repa", "erw", "reg", "lightningdit", "diffusers-dit"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
TIMES = {
    **dict.fromkeys(("dit", "diffusers-dit"), "steps"),
    **dict.fromkeys(("sit", "lightningdit"), "flipped"),
    **dict.fromkeys(("repa", "erw", "reg"), "ours"),
}
BUFFERS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
REG_KEYS = ("cls_projectors2.weight", "final_layer.linear_cls.weight", "wg_norm.weight")
SIGMA = ("final_layer.linear.weight", "final_layer.linear.bias")
EMBEDDING = "transformer_blocks.{N}.norm1.emb."
# ours -> diffusers', without .weight and .bias; {N} is the block. diffusers has the embedders once
# in every block, and queries, keys and values apart.
DIFFUSERS: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": (EMBEDDING + "timestep_embedder.linear_1",),
    "t_embedder.mlp.2": (EMBEDDING + "timestep_embedder.linear_2",),
    "y_embedder.embedding_table": (EMBEDDING + "class_embedder.embedding_table",),
    "blocks.{N}.adaLN_modulation.1": ("transformer_blocks.{N}.norm1.linear",),
    "blocks.{N}.attn.qkv": tuple(f"transformer_blocks.{{N}}.attn1.to_{part}" for part in "qkv"),
    "blocks.{N}.attn.proj": ("transformer_blocks.{N}.attn1.to_out.0",),
    "blocks.{N}.mlp.fc1": ("transformer_blocks.{N}.ff.net.0.proj",),
    "blocks.{N}.mlp.fc2": ("transformer_blocks.{N}.ff.net.2",),
    "final_layer.adaLN_modulation.1": ("proj_out_1",),
    "final_layer.linear": ("proj_out_2",),
}


class Parts(NamedTuple):
    """A file's tensors by our names: the network's, the projectors', and buffers as stored."""

    net: dict[str, Tensor]
    projectors: dict[str, Tensor]
    buffers: dict[str, Tensor]


def detect_layout(weights: Weights, path: object) -> tuple[str, str]:
    """(layout, the evidence in words) of a file, from its keys, shapes and settings.

    Raises:
        CheckpointError: no known layout, or two that look the same and mean different things.
    """
    keys, settings = weights.tensors.keys(), weights.settings
    if settings.get("layout") in LAYOUTS:
        return str(settings["layout"]), "as it says"
    if any(key.startswith("transformer_blocks.") for key in keys):
        return "diffusers-dit", "transformer_blocks.*"
    if reg := [key for key in REG_KEYS if key in keys]:
        return "reg", f"a class token: {reg[0]}"
    if "x_embedder.proj.weight" not in keys or "t_embedder.mlp.0.weight" not in keys:
        raise CheckpointError(
            f"{path} is of no layout that erw knows ({', '.join(LAYOUTS)}): its first keys are "
            f"{', '.join(sorted(keys)[:4])}"
        )
    rope = "feat_rope.freqs_cos" in keys
    if any(key.endswith(("mlp.w12.weight", "norm1.weight")) for key in keys):
        return "lightningdit", "SwiGLU or RMSNorm"
    if unshifted(weights.tensors):
        return "lightningdit", "modulations without shift"
    if "final_layer.linear.weight" not in keys:
        return "erw", "no final layer: a warm-up"
    if any(key.startswith("projectors.") for key in keys):
        return ("erw", "projectors and RoPE") if rope else ("repa", "projectors")
    if "enc_type" in settings:
        return ("erw" if rope else "repa"), "enc_type among its arguments"
    if "path_type" in settings:
        return "sit", "path_type among its arguments"
    if str(settings.get("model")).startswith("DiT"):
        return "dit", f"model {settings['model']} among its arguments"
    last, first = (weights.tensors[k] for k in (SIGMA[0], "x_embedder.proj.weight"))
    same = ("erw", "lightningdit") if rope else ("sit", "repa")
    if len(last) == 2 * first[0].numel():  # sigma channels
        same = ("dit", "sit")
    raise CheckpointError(
        f"{path} can be {same[0]} or {same[1]}, whose keys and shapes are the same and whose times "
        f"are not; say layout={same[0]!r} or {same[1]!r}"
    )


def unshifted(tensors: Mapping[str, Tensor]) -> bool:
    """Whether blocks have four modulations instead of six: no shift (LightningDiT's wo_shift)."""
    bias = tensors.get("blocks.0.adaLN_modulation.1.bias")
    return bias is not None and 4 * len(tensors["x_embedder.proj.weight"]) == len(bias)


def from_layout(tensors: Mapping[str, Tensor], layout: str, path: object) -> Parts:
    """The tensors of a file in `layout` by our names.

    Raises:
        CheckpointError: a diffusers file whose blocks disagree on an embedder.
    """
    net = _from_diffusers(tensors, path) if layout == "diffusers-dit" else dict(tensors)
    projectors = {key: net.pop(key) for key in list(net) if key.startswith("projectors.")}
    buffers = {key: net.pop(key) for key in BUFFERS if key in net}
    return Parts(_one_stack(net), projectors, buffers)


def to_layout(parts: Parts, layout: str) -> dict[str, Tensor]:
    """A state dict in `layout`: the reverse of `from_layout`."""
    if layout == "diffusers-dit":
        return _to_diffusers(parts.net)
    projectors = parts.projectors if TIMES[layout] == "ours" else {}
    return parts.buffers | parts.net | projectors


def without_sigma(net: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network with only the velocity's rows of its last layer."""
    velocity, channels = dict(net), net["x_embedder.proj.weight"].shape[1]
    for name in SIGMA:
        rows = net[name].reshape(-1, 2, channels, *net[name].shape[1:])  # pixel, which, channel
        velocity[name] = rows[:, 0].reshape(-1, *net[name].shape[1:])
    return velocity


def positions(net: SiT) -> dict[str, Tensor]:
    """The peers' buffers for a network's resolution, by their names."""
    tables = {"pos_embed": sincos_2d(net.width, net.grid)[None]}
    if net.class_token:  # REG's first position is zeros
        tables["pos_embed"] = F.pad(tables["pos_embed"], (0, 0, 1, 0))
    if isinstance(net.rope, Tensor):
        cos, sin = rope_2d(net.rope.shape[-1], net.grid)
        tables |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return tables


def depth_of(tensors: Mapping[str, Tensor], *, stem: str = "blocks") -> int:
    """Blocks in a state dict, from the number of different indices."""
    pattern = re.compile(rf"{stem}\.(\d+)\.")
    return len({match[1] for key in tensors if (match := pattern.match(key))})


def _one_stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's old names: decoder_blocks.i come after the blocks."""
    first = depth_of(tensors)
    old = re.compile(r"decoder_blocks\.(\d+)\.")

    def number(match: re.Match[str]) -> str:
        return f"blocks.{first + int(match[1])}."

    return {old.sub(number, key): value for key, value in tensors.items()}


def _diffusers_names(depth: int) -> dict[str, list[str]]:
    """Our names with .weight and .bias -> diffusers' names of the copies or thirds of a tensor."""
    names: dict[str, list[str]] = {}
    for mine, theirs in DIFFUSERS.items():
        for kind in (".weight", ".bias"):
            for n in map(str, range(depth)):
                own = names.setdefault(mine.replace("{N}", n) + kind, [])
                added = [key.replace("{N}", n) + kind for key in theirs]
                own += [key for key in added if key not in own]
    return names


def _from_diffusers(tensors: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    left, net = dict(tensors), {}
    for mine, theirs in _diffusers_names(depth_of(left, stem="transformer_blocks")).items():
        parts = [left.pop(key) for key in theirs if key in left]
        if ".attn.qkv." in mine and len(parts) == 3:
            net[mine] = torch.cat(parts)
        elif parts and any(not torch.equal(parts[0], other) for other in parts[1:]):
            raise CheckpointError(
                f"{path}: the copies of {mine} differ between blocks; erw's model has one for all"
            )
        elif parts:
            net[mine] = parts[0]
    return net | left  # what is left is unexpected, by its own name


def _to_diffusers(net: Mapping[str, Tensor]) -> dict[str, Tensor]:
    left, out = dict(net), dict[str, Tensor]()
    for mine, theirs in _diffusers_names(depth_of(net)).items():
        if mine in left:
            value = left.pop(mine)
            thirds = value.chunk(3) if ".attn.qkv." in mine else [value] * len(theirs)
            out |= dict(zip(theirs, thirds, strict=True))
    assert not left, left.keys()
    return out
