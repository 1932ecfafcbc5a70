"""What your loader would give: latents, conditioning and a frozen encoder's features, made up here.

A class is a colour, its "text" a fixed random vector, and the feature of a patch is what the patch
holds, seen through fixed random weights. So there is something to learn, and it takes seconds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
DIM = 48  # channels of the features: 768 for DINOv2-B


class Batch(NamedTuple):
    """`x` (B, C, H, W), `labels` (B,), `text` (B, 5, text_dim), `pooled` (B, pooled_dim) and the
    features `z` (B, H/2 W/2, DIM), one for each 2 x 2 patch, row by row."""

    x: Tensor
    labels: Tensor
    text: Tensor
    pooled: Tensor
    z: Tensor


def batch(size: int, *, channels: int, side: int, text_dim: int = 8, pooled_dim: int = 8) -> Batch:
    """`size` images from torch's global generator; what a class looks like is always the same."""
    fixed = torch.Generator().manual_seed(0)
    colours = torch.randn(CLASSES, channels, generator=fixed)
    weights = torch.randn(4 * channels, DIM, generator=fixed)
    words = torch.randn(CLASSES, 5, text_dim, generator=fixed)
    sentences = torch.randn(CLASSES, pooled_dim, generator=fixed)
    labels = torch.randint(CLASSES, (size,))
    x = colours[labels][:, :, None, None] + 0.3 * torch.randn(size, channels, side, side)
    patches = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # (B, T, 4 C)
    return Batch(x, labels, words[labels], sentences[labels], torch.tanh(patches @ weights))


class Losses(NamedTuple):
    """What a step came to; `flow` is 0 in warm-up, where it is not computed."""

    phase: str
    flow: float
    align: float

    def __str__(self) -> str:
        return f"{self.phase:6s} flow {self.flow:6.3f}  align {self.align:+.3f}"
