"""Small checkpoints with golden weights in the layouts that peers released."""

import torch

from erw.interop.layouts import positions
from erw.models import SiT
from helpers.reference import weight

SIZE = dict(input_size=8, patch=2, width=64, depth=4, heads=4, num_classes=1000)
LIGHTNING = {"rope": True, "norm": "rms", "mlp": "swiglu"}
PROJECTOR = {"0": (48, 64), "2": (48, 48), "4": (32, 48)}


def peer(*, projector=False, **options):
    """A peer's state dict with golden weights: all of our names, and its buffers."""
    net = SiT(**SIZE | options)
    state = {k: weight(k, *p.shape) for k, p in net.named_parameters()}
    if projector:
        for layer, shape in PROJECTOR.items():
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                key = f"projectors.0.{layer}.{kind}"
                state[key] = weight(key, *size)
    return positions(net) | state


def save(state, path):
    """Write a state dict the way its suffix says; returns the path."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def same(got, want):
    """Two state dicts, bit by bit."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
