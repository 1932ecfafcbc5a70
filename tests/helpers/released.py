"""Small checkpoints with golden weights in the layouts that peers released."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.interop.layouts import positions
from erw.models import SiT
from helpers.reference import weight

SIZE = dict(input_size=8, patch=2, width=64, depth=4, heads=4, num_classes=1000)
LIGHTNING = {"rope": True, "norm": "rms", "mlp": "swiglu"}
PROJECTOR = {"0": (48, 64), "2": (48, 48), "4": (32, 48)}


def peer(*, projector: bool = False, **options: Any) -> dict[str, Tensor]:
    """A peer's state dict with golden weights: all of our names, and its buffers."""
    net = SiT(**SIZE | options)
    state = {k: weight(k, *p.shape) for k, p in net.named_parameters()}
    if projector:
        for layer, shape in PROJECTOR.items():
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                key = f"projectors.0.{layer}.{kind}"
                state[key] = weight(key, *size)
    return positions(net) | state


def save(state: dict[str, Any], path: Path) -> Path:
    """Write a state dict the way its suffix says; returns the path."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Two state dicts, bit by bit."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
