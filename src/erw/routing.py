"""Token routing: some blocks of a transformer see only some of an image's patches.

TREAD (arXiv 2501.04765): the others bypass those blocks. SPRINT (arXiv 2510.21986): a mask token
stands for them behind those blocks, whose output g is fused with all tokens f from before.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Route(NamedTuple):
    """What routed blocks, and taps of them, see in one forward pass; SPRINT's are the model's."""

    blocks: tuple[int, ...] = (0, 0)  # first and last, counted from 1
    kept: Tensor | None = None  # (B, K) patches, in rising order; None: all
    # (B,) images whose g is the mask token throughout; True: all are, and the blocks do not run
    dropped: Tensor | bool = False


def choose(u: Tensor, keep: float, rule: str = "uniform") -> Tensor:
    """Patches (B, K) by uniform numbers u (B, T), the largest of all, or of each 2 x 2 (`grid`)."""
    k, image = round(keep * u.shape[1]), u.unflatten(1, (1, round(u.shape[1] ** 0.5), -1))
    _, kept = F.max_pool2d(image, 2, return_indices=True) if rule == "grid" else u.topk(k)
    return kept.flatten(1).sort(1).values


def index(x: Tensor, kept: Tensor, patches: int) -> Tensor:
    """(B, K, D), where kept patches are in tokens x (B, T, D); a class token before them stays."""
    before = x.shape[1] - patches
    return F.pad(kept + before, (before, 0))[..., None].expand(-1, -1, x.shape[2])
