"""DINOv2's positions as its own code interpolates them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OFFSET = 0.1


def released_positions(network: Any, tokens: int) -> dict[str, Tensor]:
    """Position embeddings (1, 1 + tokens^2, D) under their name in transformers; {} if they fit.

    DINOv2's code scales the grid by (tokens + 0.1) / side, which moves the last of 16 positions by
    a quarter of a step of the stored 37; transformers scales by tokens / side. Numbers published
    with torch.hub's model, FD-DINOv2 above all, are of the former.
    """
    held = network.embeddings.position_embeddings
    side = round((held.shape[1] - 1) ** 0.5)
    if side == tokens:
        return {}
    grid = held[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
    grid = F.interpolate(grid, scale_factor=(tokens + OFFSET) / side, mode="bicubic")
    found = torch.cat([held[:, :1], grid.flatten(2).transpose(1, 2).to(held)], 1)
    return {"embeddings.position_embeddings": found}
