"""The interface of a frozen vision encoder, and what encoders on a grid of patches share."""

import math
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.errors import ConfigError, DataError

Pixels = tuple[Sequence[float], Sequence[float]]  # mean and deviation by channel, of pixels in 0..1
IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Encoder(nn.Module):
    """A frozen vision encoder. It owns its preprocessing: resize, mean and std, patch grid.

    A new one sets the attributes below and defines `grid`, `forward` or `both`, and `pooled` if it
    has such features; `PatchEncoder` has the rest. It freezes its weights, so no gradients flow.
    """

    name: str  # as given to load_encoder, with everything that changes its features
    dim: int  # width of a patch token
    dim_pooled: int = 0  # width of the pooled feature, 0 if there is none
    dim_class: int = 0  # width of the class token, 0 if there is none
    revision: str | None = None  # commit of weights from the hub
    class_names: tuple[str, ...] | None = None  # whose labels (B,) `forward` takes too, if any

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of patch tokens for images of that side; `DataError` if impossible."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> patch tokens float32 (B, rows * columns, dim), row by row."""
        return self.both(images)[0]

    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> one feature per image, float32 (B, dim_pooled)."""
        raise DataError(f"encoder {self.name} has no pooled features: choose efficientnet-lite2")

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens as `forward`, and the class token (B, dim_class) of the same pass: one
        float32 feature of the whole image after the encoder's last norm."""
        raise DataError(f"encoder {self.name} has no class token: choose efficientnet-lite0")

    def flops(self, image_size: int, *, both: bool = False) -> int:
        """FLOPs of `forward`, or of `both`, for one image."""
        images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=self.device)
        return counted_flops(lambda: (self.both if both else self)(images))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0)).device


class PatchEncoder(Encoder):
    """An encoder with one token per `patch` x `patch` pixels of its input, which has `side` pixels;
    by default a token covers `stride` pixels of the image, up to `most` tokens a row."""

    most = math.inf

    def __init__(self, name: str, *, patch: int, stride: int = 16, side: int | None = None) -> None:
        super().__init__()
        if side is not None and (side < patch or side % patch):
            raise ConfigError(f"side {side} of {name}: expected a multiple of its patch, {patch}")
        self.name = name + (f"@{side}" if side else "")
        self.patch, self.stride, self.side = patch, stride, side

    def grid(self, image_size: int) -> tuple[int, int]:
        tokens = self.side / self.patch if self.side else min(image_size / self.stride, self.most)
        if tokens % 1:
            hint = (
                f"do not divide {image_size}; set its input side, as {self.name}@{16 * self.patch}"
            )
            raise DataError(f"{self.name}: {self.stride} px a token {hint}")
        return int(tokens), int(tokens)

    def resized(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, s, s) in 0..255, s the side of the input."""
        return resize(images.to(self.device), self.grid(images.shape[-1])[0] * self.patch)

    def set_pixels(self, pixels: Pixels, *, hashed: bool = False) -> None:
        """Mean and deviation for `normalised`; `hashed`: part of the state and so of its hash."""
        for key, values in zip(("mean", "deviation"), pixels, strict=True):
            scaled = 255 * torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(key, scaled, persistent=hashed)

    def normalised(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) in 0..255 -> float32 on the weights' device, standardised."""
        pixels = pixels.to(self.device).float()
        return (pixels - self.get_buffer("mean")) / self.get_buffer("deviation")


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of `run`, as torch counts them, with unfused attention (a CPU's fused has no count)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tokens_of(feature_map: Tensor) -> Tensor:
    """(B, D, rows, columns) -> float32 (B, rows * columns, D), row by row."""
    return feature_map.flatten(2).transpose(1, 2).float().contiguous()


def resize(images: Tensor, side: int, *, rounded: bool = False) -> Tensor:
    """uint8 (B, 3, H, H) -> float32 (B, 3, side, side) in 0..255, bicubic, antialiased.

    `rounded`: uint8 on the CPU, as Pillow to two levels in 1 % of the pixels; else up to 20 apart.
    """
    check_images(images, square=True)
    pixels = images.cpu() if rounded else images.float()
    if images.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 255)


def check_images(images: Tensor, *, square: bool = False) -> None:
    """Raise `DataError` unless the images are uint8 (B, 3, H, W), `square`: with H = W."""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] != 3:
        raise DataError(f"images are {images.dtype} {shape}: expected uint8 (B, 3, H, W)")
    if square and shape[2] != shape[3]:
        raise DataError(f"images are {shape[3]} x {shape[2]}: expected squares")
