"""Features as a cache stores them: 16-bit floats, or int8 with a scale per token."""

from typing import NamedTuple

import torch
from torch import Tensor

from erw.errors import DataError

FORMATS = ("float16", "bfloat16", "int8")


class Packed(NamedTuple):
    """`values` (..., D) of a stored dtype; `scale` (...,) float32 for int8, else None."""

    values: Tensor
    scale: Tensor | None


def pack(tokens: Tensor, format: str, *, name: str = "features") -> Packed:
    """Float tokens (..., D) in one of `FORMATS`. Raises DataError for numbers that do not fit."""
    if format == "int8":
        scale = tokens.float().abs().amax(-1) / 127
        nonzero = torch.where(scale > 0, scale, 1.0)[..., None]
        packed = Packed(torch.round(tokens.float() / nonzero).to(torch.int8), scale)
    else:
        packed = Packed(tokens.to(getattr(torch, format)), None)
    if not torch.isfinite(packed.values if packed.scale is None else packed.scale).all():
        largest = f"largest magnitude {float(tokens.abs().max()):g}"
        raise DataError(f"{name} do not fit into {format} ({largest}): store bfloat16")
    return packed


def unpack(packed: Packed) -> Tensor:
    """float32 tokens (..., D)."""
    values = packed.values.float()
    return values if packed.scale is None else values.mul_(packed.scale[..., None])
