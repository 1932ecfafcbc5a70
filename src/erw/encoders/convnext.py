"""ConvNeXt V2 through transformers: its last map, row by row, and the map's mean."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.encoders.base import Encoder, resize, resize_bytes
from erw.encoders.pretrained import Hub, pretrained
from erw.encoders.vits import IMAGENET
from erw.errors import ConfigError, DataError

STRIDE = 32
POOLED_SIDE = 224
HUB = {
    "convnextv2-b": Hub(
        "facebook/convnextv2-base-22k-224", "2f380405dd0b81e9b590bf183fd50d8b807c951e"
    )
}


class ConvNextV2(Encoder):
    """The map of stride 32 of a ConvNeXt V2 before its last norm, as patch tokens or their mean.

    ``side``: of its input, by default the image's own, and 224 for pooled features.
    """

    def __init__(self, name: str, network: Any, *, side: int | None = None) -> None:
        super().__init__()
        if side is not None and (side < STRIDE or side % STRIDE):
            raise ConfigError(f"input side {side} of {name}: expected a multiple of {STRIDE}")
        self.name = name + (f"@{side}" if side else "")
        self.network, self._side = network, side
        self.dim = self.dim_pooled = int(network.config.hidden_sizes[-1])
        for key, values in zip(("mean", "deviation"), IMAGENET, strict=True):
            self.register_buffer(key, 255 * torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def grid(self, image_size: int) -> tuple[int, int]:
        side = self._side or image_size
        if side % STRIDE:
            raise DataError(
                f"{self.name} gives one token per {STRIDE} px, which does not divide images of "
                f"{side} px: name an input side, as in {self.name}@{POOLED_SIDE}"
            )
        return side // STRIDE, side // STRIDE

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        side = self.grid(images.shape[-1])[0] * STRIDE
        pixels = resize(images.to(self.mean.device), side)  # type: ignore[arg-type]
        return self._map(pixels).flatten(2).transpose(1, 2).contiguous()

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        pixels = resize_bytes(images, self._side or POOLED_SIDE)
        return self._map(pixels.to(self.mean.device).float()).mean((2, 3))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "ConvNextV2":
        """Stays in eval mode: a frozen teacher inside a model that is trained must not change."""
        return super().train(False)

    def _map(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.network(
            pixel_values=(pixels - self.mean) / self.deviation  # type: ignore[operator]
        ).last_hidden_state
        return found.float()


def load(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    """The entry ``name`` with weights from the hub, or from a local folder.

    Raises ``CheckpointError`` where weights are missing, incomplete or of another family.
    """
    network = pretrained("ConvNextV2Model", ("convnextv2",), HUB[name], weights, name=name)
    return ConvNextV2(name, network, side=side)
