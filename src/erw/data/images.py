"""One image file to uint8 RGB, and to a square of some size; or a reason why not."""

import contextlib
import io
import math
from typing import Any

import numpy as np

from erw.errors import DataError, one_line
from erw.rng import seeded

CROPS = ("adm", "resize", "random")
WHITE = (255, 255, 255)
# What Pillow opens and people keep photographs in; documents, vector and array formats stay out.
_ENDINGS = (
    ".apng .avif .bmp .dds .dib .gif .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .mpo .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi .tga .tif .tiff .webp"
)
EXTENSIONS = frozenset(_ENDINGS.split())
_MOST_PIXELS = 89_478_485  # where Pillow begins to warn
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation to Pillow's Transpose


class Unreadable(DataError):
    """One image that cannot be used. The message is the reason alone, without the path."""


def decode(data: bytes, *, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Pixels of an image file: uint8 (H, W, 3), upright by EXIF.

    Transparency is composited on `background`. Of 12- and 16-bit greyscale the upper eight bits are
    taken, as Pillow does for 16-bit RGB. Of animations and pages, the first. Raises `Unreadable`.
    """
    if not data:
        raise Unreadable("empty file")
    Image = _pillow()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise Unreadable(f"more than {_MOST_PIXELS} pixels")
            image.load()
            pixels = _to_rgb(image, data, background)
            with contextlib.suppress(Exception):  # an EXIF block that cannot be read turns nothing
                pixels = pixels.transpose(_TURNS[image.getexif()[0x0112]])
            return np.asarray(pixels)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError as error:
        raise Unreadable("not an image that Pillow knows") from error
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error
        raise Unreadable(f"damaged or truncated ({one_line(error)})") from error


def channels(data: bytes) -> str | None:
    """What an image file's header promises: "grey", "colour" or "transparent"; None: unreadable."""
    try:
        with _pillow().open(io.BytesIO(data)) as image:
            if image.mode in _TRANSPARENT or "transparency" in image.info:
                return "transparent"
            return "grey" if image.mode[0] in "1LIF" and image.mode != "LAB" else "colour"
    except Exception:  # `decode` names the reason
        return None


def _pillow() -> Any:
    """PIL.Image, which reads PNGs with more than a megabyte of text or colour profile."""
    from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    return Image


def _to_rgb(image: Any, data: bytes, background: tuple[int, int, int]) -> Any:
    """Any Pillow mode to RGB."""
    from PIL import Image

    mode, clear = image.mode, image.info.get("transparency")
    # Mode I is 16-bit too in these formats: Pillow scales a PGM of any depth to 0..65535.
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        samples = np.asarray(image).astype(np.int64)[..., None]
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose samples Pillow gives as stored
        pixels = (samples >> tags.get(258, (16,))[0] - 8).clip(0, 255).astype(np.uint8)  # depth
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow heeds up to 8 bits
            pixels = 255 - pixels
        return _keyed(pixels.repeat(3, axis=2), samples, clear, background)
    if mode in ("I", "F"):
        raise Unreadable(f"32-bit samples (Pillow mode {mode}), whose range is not known")
    if image.format == "PNG" and clear is not None:
        depth = data[24]  # in the header; Pillow leaves the transparent colour at this depth
        if mode == "L":
            image.info["transparency"] *= 255 // ((1 << depth) - 1)
        elif mode == "RGB" and depth == 16:
            pixels = np.array(image)
            with Image.open(io.BytesIO(data)) as low:  # Pillow gives high bytes: read the low too
                low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
                samples = pixels.astype(np.int64) << 8 | np.asarray(low)
            return _keyed(pixels, samples, clear, background)
    if mode in _TRANSPARENT or clear is not None:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _keyed(pixels: np.ndarray, samples: np.ndarray, clear: Any, background: Any) -> Any:
    """RGB, with the background where 16-bit samples are the transparent colour.

    Pillow compares that colour with samples of 8 bits.
    """
    from PIL import Image

    if clear is not None:
        pixels[(samples == clear).all(-1)] = background
    return Image.fromarray(pixels)


def crop(image: np.ndarray, size: int, *, kind: str = "adm", seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3), by one of `CROPS`.

    "resize" squashes: the aspect ratio is lost. "random" is a square of a random place and scale,
    which covers 0.8 to 1 of the short side, as in ADM; `seed` moves it.
    """
    from PIL import Image

    if kind == "adm":
        return adm_center_crop(image, size)
    if kind == "resize":
        squashed = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(squashed)
    if kind == "random":
        draw = np.random.Generator(np.random.Philox(seeded(seed, "crop")))
        short = int(draw.integers(size, math.ceil(size / 0.8) + 1))
        top, left = draw.random(2)
        return _short_side(image, size, short, place=(top, left))
    raise DataError(f"unknown crop {kind!r}: choose one of {', '.join(CROPS)}")


def adm_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre crop of ADM (Dhariwal and Nichol 2021), to the pixel.

    Halve with a box filter while the short side is at least twice `size`, bring the short side to
    `size` bicubically, cut the middle.
    """
    return _short_side(image, size, size, place=None)


def _short_side(
    image: np.ndarray, size: int, short: int, *, place: tuple[float, float] | None
) -> np.ndarray:
    """Scale the short side to `short`, then cut `size` at `place` (0..1; None: the middle)."""
    from PIL import Image

    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * short:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = short / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if width * height > _MOST_PIXELS:
        raise Unreadable(f"too long and thin: would be {width} x {height} pixels when scaled")
    # Resizing only the box that is kept would be faster, but is not the same to the pixel.
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    if place is None:
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top, left = (int(p * (n - size + 1)) for p, n in zip(place, (height, width), strict=True))
    return scaled[top : top + size, left : left + size]
