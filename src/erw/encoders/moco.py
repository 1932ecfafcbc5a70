"""MoCo v3's ViT-B and ViT-L (arXiv 2104.02057) from the checkpoint files that RCG published.

A plain ViT with pre-norm blocks and fixed sin-cos positions for 14 x 14 patches of 16 px; other
grids interpolate these, as REPA does. There is no copy on the hub: the file is named by its user.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.encoders.base import IMAGENET, Encoder, PatchEncoder
from erw.encoders.pretrained import load_exactly, read_checkpoint
from erw.errors import CheckpointError
from erw.models.sit import Attention, sincos_2d

PATCH = 16
TRAINED_GRID = 14
_PREFIX = "module.base_encoder."
# RCG's export renamed "1" to the block's number in two blocks, as in blocks.13.norm13.
_TYPO = re.compile(r"^blocks\.(?:13\.(norm|mlp\.fc)13|14\.(norm|mlp\.fc)14)(?=\.)")
_SOURCE = "RCG's release (github.com/LTH14/rcg) links them"


class Size(NamedTuple):
    """Blocks, channels and attention heads."""

    depth: int
    width: int
    heads: int


SIZES = {"mocov3-b": Size(12, 768, 12), "mocov3-l": Size(24, 1024, 16)}


class MoCoV3(PatchEncoder):
    """Patch tokens after the last norm; one token per 16 px unless `side` is set.

    The class token is CLS after the same norm, without the 256 channels of the head that RCG adds.
    """

    positions: Tensor

    def __init__(self, name: str, size: Size, *, side: int | None = None) -> None:
        super().__init__(name, patch=PATCH, side=side)
        self.dim = self.dim_class = size.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, size.width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.set_pixels(IMAGENET)
        # SiT's positions with the row in the first half of the channels.
        positions = sincos_2d(size.width, TRAINED_GRID).roll(size.width // 2, 1)[None]
        self.register_buffer("positions", positions, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.both(images)[0]

    @torch.no_grad()
    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed["proj"](self.normalised(self.resized(images)))
        x = x.flatten(2).transpose(1, 2) + interpolated(self.positions, x.shape[-1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)  # CLS has no position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).float()
        return x[:, 1:].contiguous(), x[:, 0]


class _Block(nn.Module):
    """Attention and MLP, each on a layer norm; names are those of the checkpoint."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, size.heads, qk_norm=None)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), None)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Positions (1, T, D) of a square grid for another one, bicubic with antialiasing."""
    before = round(positions.shape[1] ** 0.5)
    if before == side:
        return positions
    grid = positions.transpose(1, 2).unflatten(2, (before, before)).float()
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def load(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    """The entry `name` from a checkpoint file. Raises `CheckpointError` if it does not fit."""
    if weights is None:
        raise CheckpointError(
            f"weights of {name} come as a file ({_SOURCE}): name it, as in {name}=FILE.pth.tar"
        )
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}; {_SOURCE}")
    checkpoint = read_checkpoint(weights)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{weights} has no state_dict: expected a checkpoint of MoCo v3")
    encoder = MoCoV3(name, SIZES[name], side=side)
    state = backbone(state)
    stored = state.pop("pos_embed", None)
    expected = F.pad(encoder.positions, (0, 0, 1, 0))  # zeros for CLS
    if stored is not None and (
        stored.shape != expected.shape or not torch.allclose(stored.float(), expected, atol=1e-4)
    ):
        raise CheckpointError(f"{weights}: its positions are not MoCo v3's of 14 x 14 patches")
    load_exactly(encoder, state, f"{weights} is no {name}")
    return encoder


def backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The online encoder's weights without its heads, names corrected."""
    parts = {}
    for name, value in state.items():
        short = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and short.split(".")[0] not in ("head", "fc"):
            parts[_TYPO.sub(_corrected, short)] = value
    return parts


def _corrected(match: re.Match[str]) -> str:
    number = "1" if match[1] else "2"
    return f"blocks.{13 if match[1] else 14}.{match[1] or match[2]}{number}"
