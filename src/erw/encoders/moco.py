"""MoCo v3's ViT-B and ViT-L (arXiv 2104.02057) from the checkpoint files that RCG published.

A plain ViT with pre-norm blocks and fixed sin-cos positions for 14 x 14 patches of 16 px; other
grids interpolate these, as REPA does. There is no copy on the hub: the file is named by its user.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.encoders.base import IMAGENET, PatchEncoder
from erw.encoders.pretrained import load_exactly, read_state
from erw.errors import CheckpointError
from erw.models.sit import Attention, sincos_2d

PATCH, TRAINED_GRID = 16, 14
# name -> blocks, channels, attention heads
SIZES = {"mocov3-b": (12, 768, 12), "mocov3-l": (24, 1024, 16)}
_PREFIX = "module.base_encoder."


class MoCoV3(PatchEncoder):
    """Patch tokens and CLS after the last norm; one token per 16 px unless `side` is set."""

    def __init__(self, name: str, *, side: int | None = None, weights: Path | None = None) -> None:
        super().__init__(name, patch=PATCH, side=side)
        if weights is None:
            raise CheckpointError(f"{name} comes as a file (github.com/LTH14/rcg): {name}=FILE")
        depth, width, heads = SIZES[name]
        self.dim = self.dim_class = width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.set_pixels(IMAGENET)
        # SiT's positions with the row in the first half of the channels.
        positions = sincos_2d(width, TRAINED_GRID).roll(width // 2, 1).T
        positions = positions.unflatten(1, (TRAINED_GRID, TRAINED_GRID))[None]
        self.register_buffer("positions", positions, persistent=False)
        load_exactly(self, backbone(read_state(weights)), f"{weights} is no {name}")
        self.eval().requires_grad_(False)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed["proj"](self.normalised(self.resized(images)))
        positions = self.get_buffer("positions")
        if x.shape[-1] != TRAINED_GRID:
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic", antialias=True)
        x = (x + positions).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # CLS has no position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).float()
        return x[:, 1:].contiguous(), x[:, 0]


class _Block(nn.Module):
    """Attention and MLP, each on a layer norm; names are those of the checkpoint."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=None)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"fc1": fc1, "fc2": fc2})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), None)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The online encoder's weights without positions and heads, names corrected."""
    parts = {}
    for name, value in state.items():
        short = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and short.split(".")[0] not in ("pos_embed", "head", "fc"):
            # RCG's export renamed "1" to the block's number in two blocks, as in blocks.13.norm13.
            short = re.sub(r"^(blocks\.13\.(?:norm|mlp\.fc))13", r"\g<1>1", short)
            parts[re.sub(r"^(blocks\.14\.(?:norm|mlp\.fc))14", r"\g<1>2", short)] = value
    return parts
