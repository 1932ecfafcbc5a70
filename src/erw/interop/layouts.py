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

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from erw.errors import CheckpointError, raised_as
from erw.models import SiT
from erw.models.sit import rope_2d, sincos_2d

STEPS, FLIPPED, OURS = "in 1,000 steps", "from noise (0) to data (1)", "from data (0) to noise (1)"
TIMES = {
    **{"dit": STEPS, "sit": FLIPPED, "repa": OURS, "erw": OURS, "reg": OURS},
    **{"lightningdit": FLIPPED, "diffusers-dit": STEPS},
}
LAYOUTS = tuple(TIMES)
BUFFERS, PROJECTOR = ("pos_embed", "feat_rope.freqs_"), "projectors."
TABLE, LAST = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
SIGMA = (LAST, "final_layer.linear.bias")
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


def detect_layout(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: object
) -> tuple[str, str]:
    """(layout, the evidence in words) of a file, from its keys, shapes and settings. Raises
    CheckpointError: no known layout, or two that look the same and mean different things."""
    if settings.get("layout") in LAYOUTS:
        return str(settings["layout"]), "as it says"
    if "transformer_blocks." in (keys := " ".join(tensors)):
        return "diffusers-dit", "transformer_blocks.*"
    if "x_embedder.proj.weight" not in tensors:
        choices = ", ".join(LAYOUTS)
        raise CheckpointError(f"{path} is of no known layout ({choices}); it has {keys[:100]}")
    rope = "feat_rope.freqs_cos" in tensors
    repa = "erw" if rope else "repa"
    signs = (
        ("reg", "a class token", "cls_projectors2." in keys),
        ("lightningdit", "SwiGLU or RMSNorm", "mlp.w12." in keys or ".norm1.weight" in keys),
        ("lightningdit", "modulations without shift", unshifted(tensors)),
        ("erw", "no final layer: a warm-up", LAST not in tensors),
        (repa, "projectors", "projectors." in keys),
        (repa, "enc_type among its arguments", "enc_type" in settings),
        ("sit", "path_type among its arguments", "path_type" in settings),
        ("dit", "model among its arguments", str(settings.get("model")).startswith("DiT")),
    )
    for layout, evidence, present in signs:
        if present:
            return layout, evidence
    same = ("erw", "lightningdit") if rope else ("sit", "repa")
    same = ("dit", "sit") if outputs_of(tensors) == 2 else same
    both = f"{same[0]} or {same[1]}, which differ in their times alone"
    raise CheckpointError(f"{path} can be {both}; say layout={same[0]!r} or {same[1]!r}")


def outputs_of(net: Mapping[str, Tensor]) -> int:
    """Numbers of the output for each one of the latent: 2 with a variance or sigma channels."""
    last, first = net.get(LAST), net["x_embedder.proj.weight"]
    return 2 if last is not None and last.numel() == 2 * first.numel() else 1


def unshifted(tensors: Mapping[str, Tensor]) -> bool:
    """Whether blocks have four modulations instead of six: no shift (LightningDiT's wo_shift)."""
    bias = tensors.get("blocks.0.adaLN_modulation.1.bias")
    width = tensors["x_embedder.proj.weight"].shape[:1]  # a hostile file's may have none
    return bias is not None and 4 * width.numel() == bias.numel()


def from_layout(tensors: Mapping[str, Tensor], layout: str, path: object) -> dict[str, Tensor]:
    """The tensors of a file by our names, with its projectors and buffers."""
    net = _from_diffusers(tensors, path) if layout == "diffusers-dit" else tensors
    first = depth_of(net)  # REPA's old names: decoder_blocks.i come after the blocks
    old = re.compile(r"decoder_blocks\.(\d+)")
    return {old.sub(lambda m: f"blocks.{first + int(m[1])}", k): v for k, v in net.items()}


def without_sigma(net: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network with only the velocity's rows of its last layer, where that has sigma's too."""
    velocity, channels = dict(net), net["x_embedder.proj.weight"].shape[1]
    for name in SIGMA if outputs_of(net) == 2 else ():
        rows = net[name].unflatten(0, (-1, 2, channels))  # pixel, which, channel
        velocity[name] = rows[:, 0].flatten(0, 1)
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


def _diffusers_names(depth: int) -> dict[str, list[str]]:
    """Our names with .weight and .bias -> diffusers' names of the copies or thirds of a tensor."""
    names: dict[str, dict[str, None]] = {}
    for n, kind in itertools.product(range(depth), (".weight", ".bias")):
        for row in DIFFUSERS.items():
            ours, theirs = row[0].replace("{N}", str(n)), [k.replace("{N}", str(n)) for k in row[1]]
            names.setdefault(ours + kind, {}).update(dict.fromkeys(k + kind for k in theirs))
    return {ours: list(theirs) for ours, theirs in names.items()}


def _from_diffusers(tensors: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    left, net = dict(tensors), {}
    for name, theirs in _diffusers_names(depth_of(left, stem="transformer_blocks")).items():
        parts, qkv = [left.pop(key) for key in theirs if key in left], ".attn.qkv." in name
        if not qkv and any(not torch.equal(parts[0], other) for other in parts[1:]):
            raise CheckpointError(f"{path}: {name} differs between blocks, erw has one for all")
        if parts:
            with raised_as(CheckpointError, f"{path}: queries, keys and values of {name} differ"):
                net[name] = torch.cat(parts) if qkv else parts[0]
    return net | left  # what is left is unexpected, by its own name


def to_diffusers(net: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network by diffusers' names: the reverse of `from_layout`."""
    out: dict[str, Tensor] = {}
    for name, theirs in _diffusers_names(depth_of(net)).items():
        if name in net:
            thirds = net[name].chunk(3) if ".attn.qkv." in name else [net[name]] * len(theirs)
            out |= dict(zip(theirs, thirds, strict=True))
    return out
