"""RDM: a residual MLP over whole representations (B, R), RCG's small model (arXiv 2312.03701).

It is a `Backbone` like `SiT`, so that the one loop trains it and the one generator samples it.
Time and class go into every block through one vector of 256 channels (RCG gives the class one of
its own).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw.errors import ConfigError
from erw.models.sit import LabelEmbed, TimeEmbed, init, zero

CONDITION = 256


class Rdm(nn.Module):
    """Representation diffusion model.

    Args:
        dim: channels R of a representation.
        depth, width: residual blocks and their channels (RCG: 12 and 1536).
        num_classes: classes; 0 for an unconditional model. The null class is the last row.
    """

    class_token = representation = tokens = 0

    def __init__(self, *, dim: int, depth: int, width: int, num_classes: int = 0) -> None:
        super().__init__()
        self.null_class, self.latent_shape = num_classes, (dim,)
        self.depth, self.width = depth, width
        self.t_embedder = TimeEmbed(CONDITION)
        self.y_embedder = LabelEmbed(num_classes + 1, CONDITION)
        self.input = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        last = nn.Linear(width, dim)
        self.output = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.SiLU(), last)
        self.apply(init)
        for module in (last, *(block.second for block in self.blocks)):
            zero(module)  # type: ignore[arg-type]

    def warmup_modules(self, depth: int) -> list[nn.Module]:
        raise ConfigError("an rdm has no tokens to align, so it has no warm-up")

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **taps: Any) -> Tensor:
        """The velocity at x (B, R) and times t (B,), for labels y (B,); y None: the null class."""
        assert not any(taps.values())  # `Run` refuses to align it
        if y is None:
            y = torch.full((len(x),), self.null_class, device=x.device)
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))
        h = self.input(x)
        for block in self.blocks:
            h = block(h, c)
        return self.output(h)


class ResidualBlock(nn.Module):
    """Two layers behind norm and SiLU, with the condition c (B, 256) added between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.first = nn.LayerNorm(width), nn.Linear(width, width)
        self.condition = nn.Linear(CONDITION, width)
        self.norm2, self.second = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        a = self.first(F.silu(self.norm1(h))) + self.condition(c)
        return h + self.second(F.silu(self.norm2(a)))
