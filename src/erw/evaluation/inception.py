"""The Inception network of 2015 that FID, sFID and the Inception Score are defined with.

Written from its definition, a table (`inception_table`). It differs from the Inception v3 that is
common today: means of pooling leave the padding out, the last block pools by maximum,
and there are 1,008 logits. Batch norms (eps 0.001) are folded into the convolutions when weights
are loaded.

Images enter as ADM's evaluator has them: uint8, resized to 299 x 299 by the bilinear rule of
TensorFlow 1, then (x - 128) / 128.

Source: Szegedy et al. (arXiv 1512.00567); `evaluations/evaluator.py` of openai/guided-diffusion.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.errors import DataError
from erw.evaluation.inception_table import BLOCKS, STEM, Conv, Spec, names

SIDE = 299
POOL, SPATIAL, LOGITS = 2048, 17 * 17 * 7, 1008
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7  # of branch1x1: ADM's mixed_6/conv:0[..., :7]
BN_EPS = 1e-3


class Activations(NamedTuple):
    """pool (B, 2048): mean of the last map, `pool_3`. spatial (B, 2023): sFID's, (17, 17, 7)."""

    pool: Tensor
    spatial: Tensor


class Inception(nn.Module):
    """The network with folded batch norms; `load_inception` fills it with weights."""

    name = "inception-2015"
    dim_pooled = POOL

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for conv in STEM:
            self.add_module(conv.name, _layer(width, conv))
            width = conv.width
        for spec in BLOCKS:
            block = Block(width, spec)
            self.add_module(spec.name, block)
            width = block.width
        self.fc = nn.Linear(width, LOGITS)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Activations:
        """uint8 (B, 3, H, W) of any size -> the features that ADM's evaluator takes.

        Raises DataError for images of another type.
        """
        last: Tensor | None = None
        for name, x in self.layers(images):
            if name == SPATIAL_BLOCK:  # the block's first branch comes first in its output
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            last = x
        assert last is not None
        return Activations(last.mean((2, 3)).float(), spatial.float().contiguous())

    @torch.no_grad()
    def layers(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every layer's and block's name with its output (B, C, h, w), in order."""
        x = normalised(images)
        for conv in STEM:
            x = F.relu(self.get_submodule(conv.name)(x))
            yield conv.name, x
            if conv.name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        for spec in BLOCKS:
            x = self.get_submodule(spec.name)(x)
            yield spec.name, x

    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> `pool_3` (B, 2048)."""
        return self(images).pool

    def logits(self, pool: Tensor) -> Tensor:
        """`pool_3` (B, 2048) -> logits (B, 1008) *without* the bias, as ADM scores them."""
        return pool @ self.fc.weight.T

    def train(self, mode: bool = True) -> "Inception":
        """Stays in eval mode: it has no other."""
        return super().train(False)


class Block(nn.Module):
    """The branches of a `Spec` on one input, joined along the channels."""

    def __init__(self, inputs: int, spec: Spec) -> None:
        super().__init__()
        self.spec, self.width = spec, 0
        for branch in spec.branches:
            width = inputs
            for conv in branch.convs:
                self.add_module(conv.name, _layer(width, conv))
                width = conv.width
            for conv in branch.split:
                self.add_module(conv.name, _layer(width, conv))
            self.width += sum(conv.width for conv in branch.split) or width

    def forward(self, x: Tensor) -> Tensor:
        joined: list[Tensor] = []
        for branch in self.spec.branches:
            y = _pool(x, branch.pool)
            for conv in branch.convs:
                y = F.relu(self.get_submodule(conv.name)(y))
            if branch.split:
                joined += [F.relu(self.get_submodule(conv.name)(y)) for conv in branch.split]
            else:
                joined.append(y)
        return torch.cat(joined, 1)


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with batch norms (`X.conv.weight`, `X.bn.*`) as those of `Inception` without.

    Raises KeyError for what is missing.
    """
    made = {"fc.weight": state["fc.weight"], "fc.bias": state["fc.bias"]}
    for name in names():
        norm = {k: state[f"{name}.bn.{k}"].double() for k in ("weight", "bias")}
        mean, var = (state[f"{name}.bn.running_{k}"].double() for k in ("mean", "var"))
        gain = norm["weight"] / (var + BN_EPS).sqrt()
        kernel = state[f"{name}.conv.weight"].double()
        made[f"{name}.weight"] = (kernel * gain.reshape(-1, 1, 1, 1)).float()
        made[f"{name}.bias"] = (norm["bias"] - mean * gain).float()
    return made


def normalised(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in -1..1, as the network takes them."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise DataError(f"images are {images.dtype} {shape}: expected uint8 (B, 3, H, W)")
    pixels = resize_tf1(images.float(), SIDE)
    return ((pixels - 128) / 128).contiguous(memory_format=torch.channels_last)


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """float32 (B, C, H, W) -> (B, C, side, side) by TensorFlow 1's bilinear rule.

    Output pixel i lies at i * H / side of the input: no half-pixel centres, no antialiasing.
    """
    low, high, part = _points(images.shape[2], side, images.device)
    rows, below = images[:, :, low], images[:, :, high]
    left, right, share = _points(images.shape[3], side, images.device)
    top = rows[..., left] + (rows[..., right] - rows[..., left]) * share
    bottom = below[..., left] + (below[..., right] - below[..., left]) * share
    return top + (bottom - top) * part[:, None]


def _points(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel: the input pixels on either side, and how far it is from the first."""
    at = torch.arange(side, dtype=torch.float32, device=device) * (size / side)
    low = at.floor().long().clamp(max=size - 1)
    return low, (low + 1).clamp(max=size - 1), at - low


def _layer(inputs: int, conv: Conv) -> nn.Conv2d:
    height, width = conv.kernel
    padding = (height // 2, width // 2) if conv.same else (0, 0)
    layer = nn.Conv2d(inputs, conv.width, conv.kernel, conv.stride, padding)
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layer


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == "mean":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "max":
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2) if kind == "halve" else x
