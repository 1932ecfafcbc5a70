"""The released layouts: what tells them apart, and how their names map to ours.

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
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from erw.errors import CheckpointError
from erw.interop.files import Found

Layout = Literal["dit", "sit", "repa", "erw", "reg", "lightningdit", "diffusers-dit"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
TIMES = {
    "dit": "steps",
    "diffusers-dit": "steps",
    "sit": "flipped",
    "lightningdit": "flipped",
    "repa": "ours",
    "erw": "ours",
    "reg": "ours",
}
BUFFERS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
REG_KEYS = ("cls_projectors2.weight", "final_layer.linear_cls.weight", "wg_norm.weight")

SIGMA = ("final_layer.linear.weight", "final_layer.linear.bias")

# ours (without .weight and .bias) -> diffusers'; {N} is the block.
DIFFUSERS = {
    "x_embedder.proj": "pos_embed.proj",
    "blocks.{N}.adaLN_modulation.1": "transformer_blocks.{N}.norm1.linear",
    "blocks.{N}.attn.proj": "transformer_blocks.{N}.attn1.to_out.0",
    "blocks.{N}.mlp.fc1": "transformer_blocks.{N}.ff.net.0.proj",
    "blocks.{N}.mlp.fc2": "transformer_blocks.{N}.ff.net.2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {  # diffusers keeps a copy in every block
    "t_embedder.mlp.0": "transformer_blocks.{N}.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.{N}.norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": (
        "transformer_blocks.{N}.norm1.emb.class_embedder.embedding_table"
    ),
}
QKV = ("to_q", "to_k", "to_v")


class Parts(NamedTuple):
    """A file's tensors by our names: the network's, the projectors', and buffers as stored."""

    net: dict[str, Tensor]
    projectors: dict[str, Tensor]
    buffers: dict[str, Tensor]


def tell(found: Found, path: object) -> tuple[str, str]:
    """(layout, what shows it) of a file, from its keys and shapes and what lies beside them.

    Raises:
        CheckpointError: it is of no layout known here, or two layouts look the same and differ in
            what they mean.
    """
    keys, beside = found.tensors.keys(), found.settings
    if beside.get("layout") in LAYOUTS:
        return str(beside["layout"]), "as it says"
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
    if unshifted(found.tensors):
        return "lightningdit", "modulations without shift"
    if "final_layer.linear.weight" not in keys:
        return "erw", "no final layer: a warm-up"
    if any(key.startswith("projectors.") for key in keys):
        return ("erw", "projectors and RoPE") if rope else ("repa", "projectors")
    if "enc_type" in beside:
        return ("erw" if rope else "repa"), "enc_type among its arguments"
    if "path_type" in beside:
        return "sit", "path_type among its arguments"
    if str(beside.get("model")).startswith("DiT"):
        return "dit", f"model {beside['model']} among its arguments"
    same = ("erw", "lightningdit") if rope else ("sit", "repa")
    if doubled(found.tensors):
        same = ("dit", "sit")
    raise CheckpointError(
        f"{path} can be {same[0]} or {same[1]}, whose keys and shapes are the same and whose times "
        f"are not; say layout={same[0]!r} or {same[1]!r}"
    )


def doubled(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the last layer has sigma channels: twice the rows that the patches have numbers."""
    last, first = tensors["final_layer.linear.weight"], tensors["x_embedder.proj.weight"]
    return len(last) == 2 * first[0].numel()


def unshifted(tensors: Mapping[str, Tensor]) -> bool:
    """Whether blocks have four modulations instead of six: no shift (LightningDiT's wo_shift)."""
    bias = tensors.get("blocks.0.adaLN_modulation.1.bias")
    width = tensors["x_embedder.proj.weight"].shape[:1]
    return bias is not None and tuple(bias.shape) == tuple(4 * size for size in width)


def ours(found: Found, layout: str, path: object) -> Parts:
    """The tensors of a file in `layout` by our names.

    Raises:
        CheckpointError: a diffusers file whose blocks disagree on an embedder.
    """
    net = dict(found.tensors)
    if layout == "diffusers-dit":
        net = _from_diffusers(net, path)
    projectors = _take(net, lambda key: key.startswith("projectors."))
    buffers = _take(net, lambda key: key in BUFFERS)
    return Parts(_one_stack(net), projectors, buffers)


def peers(parts: Parts, layout: str) -> dict[str, Tensor]:
    """The reverse of `ours`: a state dict in `layout`.

    Raises:
        CheckpointError: diffusers-dit cannot say what the network has (RoPE, other norms).
    """
    if layout == "diffusers-dit":
        return _to_diffusers(parts.net)
    with_projectors = layout in ("repa", "erw", "reg")
    return parts.buffers | parts.net | (parts.projectors if with_projectors else {})


def without_sigma(parts: Parts, sizes: dict[str, Any]) -> tuple[Parts, dict[str, Tensor]]:
    """The last layer's rows of the velocity, and apart from them those of sigma."""
    sizes["out_channels"] = channels = sizes["channels"]
    net, sigma = dict(parts.net), {}
    for name in SIGMA:
        value = net[name]
        rows = value.reshape(-1, 2, channels, *value.shape[1:])  # patch pixel, which, channel
        net[name], sigma[name] = (rows[:, i].reshape(-1, *value.shape[1:]) for i in (0, 1))
    return parts._replace(net=net), sigma


def with_sigma(velocity: Tensor, sigma: Tensor, *, channels: int) -> Tensor:
    """The last layer's rows (p * p * 2C, ...) from those of the velocity and of sigma."""
    both = [rows.reshape(-1, channels, *rows.shape[1:]) for rows in (velocity, sigma)]
    return torch.stack(both, 1).reshape(-1, *velocity.shape[1:])


def _take(tensors: dict[str, Tensor], which: Any) -> dict[str, Tensor]:
    """Remove and return those whose key passes `which`."""
    return {key: tensors.pop(key) for key in list(tensors) if which(key)}


def _one_stack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's legacy names: decoder_blocks.i come after the blocks."""
    first = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})

    def name(key: str) -> str:
        if not (match := re.match(r"decoder_blocks\.(\d+)\.(.*)", key)):
            return key
        return f"blocks.{first + int(match[1])}.{match[2]}"

    return {name(key): value for key, value in tensors.items()}


def depth_of(tensors: Mapping[str, Tensor], *, stem: str = "blocks") -> int:
    """Blocks in a state dict, from the number of different indices."""
    pattern = re.compile(rf"{stem}\.(\d+)\.")
    return len({match[1] for key in tensors if (match := pattern.match(key))})


def _names(depth: int) -> dict[str, str]:
    """Our name -> diffusers' for all that is one to one, with .weight and .bias."""
    names: dict[str, str] = {}
    for mine, theirs in DIFFUSERS.items():
        for block in range(depth) if "{N}" in mine else [0]:
            for kind in ("weight", "bias"):
                at = str(block)
                names[f"{mine.replace('{N}', at)}.{kind}"] = f"{theirs.replace('{N}', at)}.{kind}"
    return names


def _copies(mine: str, depth: int) -> list[str]:
    """Where diffusers keeps the copies of one of our embedders' weights."""
    stem, kind = mine.rsplit(".", 1)
    return [f"{EMBEDDERS[stem].replace('{N}', str(block))}.{kind}" for block in range(depth)]


def _embedder_weights() -> list[str]:
    layers = [f"{stem}.{kind}" for stem in list(EMBEDDERS)[:2] for kind in ("weight", "bias")]
    return [*layers, "y_embedder.embedding_table.weight"]


def _from_diffusers(tensors: dict[str, Tensor], path: object) -> dict[str, Tensor]:
    depth = depth_of(tensors, stem="transformer_blocks")
    left, net = dict(tensors), {}
    for mine, theirs in _names(depth).items():
        if theirs in left:
            net[mine] = left.pop(theirs)
    for mine in _embedder_weights():
        copies = [left.pop(key) for key in _copies(mine, depth) if key in left]
        if any(not torch.equal(copies[0], other) for other in copies[1:]):
            raise CheckpointError(
                f"{path}: the copies of {mine} differ between blocks; erw's model has one for all"
            )
        if copies:
            net[mine] = copies[0]
    for block in range(depth):
        for kind in ("weight", "bias"):
            three = [f"transformer_blocks.{block}.attn1.{part}.{kind}" for part in QKV]
            if all(key in left for key in three):
                net[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([left.pop(key) for key in three])
    return net | left  # what is left is unexpected, by its own name


def _to_diffusers(net: Mapping[str, Tensor]) -> dict[str, Tensor]:
    depth = depth_of(net)
    left, out = dict(net), {}
    if extra := [
        key for key in net if key.endswith(("_norm.weight", "norm1.weight", "w12.weight"))
    ]:
        raise CheckpointError(f"diffusers-dit has no place for {extra[0]}; choose another layout")
    for mine, theirs in _names(depth).items():
        out[theirs] = left.pop(mine)
    for mine in _embedder_weights():
        value = left.pop(mine)
        out |= {key: value for key in _copies(mine, depth)}
    for block in range(depth):
        for kind in ("weight", "bias"):
            thirds = left.pop(f"blocks.{block}.attn.qkv.{kind}").chunk(3)
            for part, third in zip(QKV, thirds, strict=True):
                out[f"transformer_blocks.{block}.attn1.{part}.{kind}"] = third
    assert not left, left.keys()
    return out
