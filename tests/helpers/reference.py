"""The rule that made the golden values (tests/golden/README.md), and weights filled by it."""

import json
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Golden = Callable[[str], dict[str, np.ndarray]]
"""The fixture `golden` of conftest."""
GAINS = ("norm1.weight", "norm2.weight", "norm_final.weight", "q_norm.weight", "k_norm.weight")


def array(tag: str, *shape: int, seed: int = 1) -> np.ndarray:
    """The standard normal array that belongs to a tag."""
    state = np.random.RandomState(zlib.crc32(f"{seed}:{tag}".encode()))
    return state.standard_normal(shape).astype(np.float32)


def weight(key: str, *shape: int) -> Tensor:
    """The weight that belongs to a peer's key."""
    value = 0.12 * array("w:" + key, *shape)
    return torch.from_numpy(value + 1 if key.endswith(GAINS) else value)


@torch.no_grad()
def fill(module: nn.Module, *, prefix: str = "") -> None:
    """Give every parameter the golden weight of its own name, less `prefix`."""
    for name, p in module.named_parameters():
        p.copy_(weight(name.removeprefix(prefix), *p.shape))


@torch.no_grad()
def fill_official(model: nn.Module) -> None:
    """As `fill`, for official SiT files: their last layer has sigma channels behind the
    velocity's."""
    fill(model)
    linear, p, c = model.final_layer.linear, model.patch, model.channels
    for name, value in linear.named_parameters():
        key = f"final_layer.linear.{name}"
        both = weight(key, 2 * len(value), *value.shape[1:])
        rows = both.reshape(p * p, 2 * c, *value.shape[1:])
        value.copy_(rows[:, :c].reshape(value.shape))


def tensors(data: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], dict]:
    """A golden file's arrays as tensors, and its meta record."""
    meta = json.loads(str(data["meta"]))
    return {k: torch.from_numpy(v) for k, v in data.items() if k != "meta"}, meta


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.detach().double() - want.double()).norm() / want.double().norm())
