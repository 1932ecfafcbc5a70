"""Numbers as they lie in a cache: 16-bit floats, or 8 bits with a scale per token."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erw.data.buffers import BUFFERS
from erw.errors import DataError

FORMATS = ("float16", "bfloat16", "int8", "float8")
SCALED = {"int8": 127.0, "float8": 448.0}
"""Formats with a scale per token, and the number that its largest magnitude becomes."""


class Packed(NamedTuple):
    """`values` (..., D) of a storable dtype; `scale` (...,) float32 for 8 bits, else None."""

    values: Tensor
    scale: Tensor | None


def pack(tokens: Tensor, kind: str, *, name: str = "features") -> Packed:
    """Float tokens (..., D) in one of `FORMATS`. Raises `DataError` if they do not fit."""
    if kind in SCALED:
        tokens = tokens.float()
        scale = tokens.abs().amax(-1) / SCALED[kind]
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        scaled = tokens / safe[..., None]
        if kind == "int8":
            packed = Packed(torch.round(scaled).to(torch.int8), scale)
        else:  # dividing may end just above what e4m3 holds, which would be NaN
            packed = Packed(scaled.clamp(-448, 448).to(torch.float8_e4m3fn), scale)
        finite = bool(torch.isfinite(scale).all())
    elif kind in FORMATS:
        packed = Packed(tokens.to(getattr(torch, kind)), None)
        finite = bool(torch.isfinite(packed.values).all())
    else:
        raise DataError(f"unknown storage format {kind!r}: choose one of {', '.join(FORMATS)}")
    if not finite:
        biggest = float(tokens.abs().max())
        raise DataError(
            f"{name} do not fit into {kind} (largest magnitude {biggest:g}): store bfloat16, or "
            "look for NaN in the network's weights"
        )
    return packed


def unpack(packed: Packed) -> Tensor:
    """float32 tokens (..., D)."""
    values = float32(packed.values)
    return values if packed.scale is None else values.mul_(packed.scale[..., None])


def float32(values: Tensor) -> Tensor:
    """`values.float()` of a CPU tensor, as a copy, three times faster where it is large."""
    if values.device.type != "cpu":
        return values.float()
    # Most of the time would be page faults.
    return torch.from_numpy(BUFFERS.empty(values.shape, np.float32)).copy_(values)


def fidelity(tokens: Tensor, packed: Packed) -> Tensor:
    """Cosine between tokens (..., D) and what reading them back gives, float64 (...,)."""
    true, read = tokens.double(), unpack(packed).double()
    norms = true.norm(dim=-1) * read.norm(dim=-1)
    cosine = (true * read).sum(-1) / norms.clamp_min(1e-300)
    # A token of zeros that stays zeros is kept perfectly.
    both_zero = (true.norm(dim=-1) == 0) & (read.norm(dim=-1) == 0)
    return torch.where(both_zero, torch.ones_like(cosine), cosine)


def to_numpy(values: Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16 as its bits in uint16, since NumPy has no such type.

    float8 likewise, in uint8.
    """
    values = values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    if values.dtype == torch.float8_e4m3fn:
        return values.view(torch.uint8).numpy()
    return values.numpy()


def from_numpy(array: np.ndarray, kind: str) -> Tensor:
    """The tensor of an array read from a cache; `kind` is its dtype's name there."""
    if kind == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if kind.startswith("float8"):
        return torch.from_numpy(array).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)
