"""Images for tests of evaluation, and an encoder without a network."""

from pathlib import Path

import torch
from torch import Tensor


class Pixels:
    """Features without a network: the mean of each channel's quarters."""

    name = "pixels"

    def __init__(self) -> None:
        self.calls = 0

    def pooled(self, images: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def pictures(count: int = 40, *, side: int = 8, seed: int = 0) -> Tensor:
    """Random pixels, uint8 (count, 3, side, side)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), generator=rng, dtype=torch.uint8)


def stripes(count: int, *, first: int = 0, side: int = 64) -> Tensor:
    """Coloured stripes without random numbers, uint8 (count, 3, side, side)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    images = []
    for i in range(first, first + count):
        planes = [rows * (i % 5 + k) + columns * (i % 7 + 2 * k) + 37 * i for k in range(3)]
        images.append(torch.stack(planes).remainder(256))
    return torch.stack(images).to(torch.uint8)


def save_pngs(folder: Path, images: Tensor) -> Path:
    """A new folder with the images as 000.png and so on."""
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def glyphs(split: str, count: int, *, size: int = 64) -> Tensor:
    """Composed OpenMoji images, uint8 (count, 3, size, size)."""
    from erw.data.sources.openmoji import OpenMojiSet

    source = OpenMojiSet(split, size=size, count=count)
    images = torch.stack([torch.from_numpy(source[i][0]) for i in range(count)])
    return images.permute(0, 3, 1, 2)
