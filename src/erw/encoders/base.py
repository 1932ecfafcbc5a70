"""What the rest of erw asks of a vision encoder, and the steps that all of them share."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.errors import DataError


class Encoder(nn.Module):
    """A frozen vision encoder. It owns its preprocessing: resize, mean and std, patch grid.

    A new one sets the attributes below and defines ``grid``, ``forward`` and, if it has any,
    ``pooled`` and ``both``.
    """

    name: str  # as given to load_encoder, with everything that changes its features
    dim: int  # width of a patch token
    dim_pooled: int  # width of the pooled feature, 0 if there is none
    dim_class: int = 0  # width of the class token, 0 if there is none
    revision: str | None = None  # of weights that came from the hub, a commit

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of that side; ``DataError`` if impossible."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> patch tokens float32 (B, rows * columns, dim), row by row."""
        raise NotImplementedError

    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> one feature an image, float32 (B, dim_pooled)."""
        raise DataError(f"encoder {self.name} has no pooled features: choose efficientnet-lite2")

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives, and the class token (B, dim_class) of the same pass.

        The class token is one float32 feature of the whole image, as the encoder's last norm leaves
        it: what REG (arXiv 2507.01467) denoises and RCG (arXiv 2312.03701) conditions on.
        """
        raise DataError(f"encoder {self.name} has no class token: choose efficientnet-lite0")

    def flops(self, image_size: int, *, pooled: bool = False, both: bool = False) -> int:
        """FLOPs of ``forward`` (or ``pooled``, or ``both``) for one image of that side; only
        layers that run."""
        held = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=held.device)
        forward = self.pooled if pooled else self.both if both else self
        return counted_flops(lambda: forward(images))


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of what `run` does, as torch counts them; only layers that run.

    Attention runs unfused: torch counts a GPU's fused kernels, but not those of a CPU.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def resize(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side) in 0..255, bicubic, antialiased.

    ``DataError`` unless the images are square uint8 RGB: a silent stretch would change features.
    """
    _squares(images)
    pixels = images.float()
    if images.shape[-1] == side:
        return pixels
    pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255)


def resize_bytes(images: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, side, side) on the CPU, as Pillow's bicubic.

    Evaluators resize files, so whole numbers, in two passes that clip in between; this differs from
    Pillow's by one or two levels in a pixel out of a hundred, `resize` by up to twenty.
    """
    _squares(images)
    if images.shape[-1] == side:
        return images.cpu()
    return F.interpolate(images.cpu(), (side, side), mode="bicubic", antialias=True)


def _squares(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise DataError(f"images are {images.dtype} {shape}: expected uint8 (B, 3, H, W)")
    if images.shape[2] != images.shape[3]:
        raise DataError(f"images are {images.shape[3]} x {images.shape[2]}: expected squares")
