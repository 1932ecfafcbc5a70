"""ConvNeXt V2 through transformers: its last map as tokens, row by row, or the map's mean."""

from pathlib import Path

import torch
from torch import Tensor

from erw.encoders.base import IMAGENET, Encoder, PatchEncoder, resize_bytes, tokens_of
from erw.encoders.pretrained import Hub, from_transformers

STRIDE = 32
POOLED_SIDE = 224
HUB = {
    "convnextv2-b": Hub(
        "facebook/convnextv2-base-22k-224", "2f380405dd0b81e9b590bf183fd50d8b807c951e"
    )
}


class ConvNextV2(PatchEncoder):
    """The map of stride 32 of a ConvNeXt V2 before its last norm, as patch tokens or their mean.

    `side`: of its input, by default the image's own, and 224 for pooled features.
    """

    def __init__(self, name: str, source: Hub | Path, *, side: int | None = None) -> None:
        super().__init__(name, patch=STRIDE, stride=STRIDE, side=side)
        self.network = from_transformers("ConvNextV2Model", ("convnextv2",), source, name=name)
        self.dim = self.dim_pooled = int(self.network.config.hidden_sizes[-1])
        self.set_pixels(IMAGENET)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return tokens_of(self._map(self.resized(images)))

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        return self._map(resize_bytes(images, self.side or POOLED_SIDE)).mean((2, 3))

    def _map(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=self.normalised(pixels)).last_hidden_state.float()


def load(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    """The entry `name` with weights from the hub, or from a local folder."""
    return ConvNextV2(name, weights or HUB[name], side=side)
