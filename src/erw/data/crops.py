"""An image of any shape to a square of `size` pixels."""

import math

import numpy as np

from erw.data.images import Unreadable
from erw.errors import DataError
from erw.rng import seeded

CROPS = ("adm", "resize", "random")


def crop(image: np.ndarray, size: int, *, kind: str = "adm", seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3). `kind` is one of `CROPS`; `seed` moves "random" only."""
    if 0 in image.shape:
        raise Unreadable("has no pixels")
    if kind == "adm":
        return adm_center_crop(image, size)
    if kind == "resize":
        return resize(image, size)
    if kind == "random":
        return random_crop(image, size, seed=seed)
    raise DataError(f"unknown crop {kind!r}: choose one of {', '.join(CROPS)}")


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre crop of ADM (Dhariwal and Nichol 2021), to the pixel.

    Halve with a box filter while the short side is at least twice `size`, bring the short side to
    `size` bicubically, cut the middle.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    return _short_side(image, size, size, where=None)


def random_crop(
    image: np.ndarray, size: int, *, seed: int, smallest: float = 0.8, largest: float = 1.0
) -> np.ndarray:
    """A square of a random place and scale: it covers 0.8 to 1 of the short side, as in ADM."""
    draw = np.random.Generator(np.random.Philox(seeded(seed, "crop")))
    low, high = math.ceil(size / largest), math.ceil(size / smallest)
    short = int(draw.integers(low, high + 1))
    top, left = draw.random(2)
    return _short_side(image, size, short, where=(float(top), float(left)))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Squash to a square, bicubic with antialiasing; the aspect ratio is lost."""
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _short_side(
    image: np.ndarray, size: int, short: int, *, where: tuple[float, float] | None
) -> np.ndarray:
    """Scale the short side to `short`, then cut `size` at `where` (0..1; None: the middle)."""
    from PIL import Image

    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * short:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = short / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if where is None:
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top = int(where[0] * (height - size + 1))
        left = int(where[1] * (width - size + 1))
    if width * height > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        raise Unreadable(f"too long and thin: would be {width} x {height} pixels when scaled")
    # Resizing only the box that is kept would be faster, but is not the same to the pixel.
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return scaled[top : top + size, left : left + size]
