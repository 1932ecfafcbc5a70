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
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation to Pillow's Transpose


class Unreadable(DataError):
    """One image that cannot be used. The message is the reason alone, without the path."""


def decode(data: bytes, *, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Pixels of an image file: uint8 (H, W, 3), upright by EXIF.

    Transparency is composited on `background`. Of 12- and 16-bit greyscale the upper eight bits are
    taken, as Pillow does for 16-bit RGB. Of animations and pages, the first. Raises `Unreadable`.
    """
    from PIL import Image, PngImagePlugin

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # PNGs with megabytes of text
    if not data:
        raise Unreadable("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"more than {_MOST_PIXELS} pixels")
            image.load()
            pixels = _to_rgb(image, data, background)
            with contextlib.suppress(Exception):  # an EXIF block that cannot be read turns nothing
                pixels = pixels.transpose(_TURNS[image.getexif()[0x0112]])
            return np.asarray(pixels)
    except Image.UnidentifiedImageError as error:
        raise Unreadable("not an image that Pillow knows") from error
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error
        raise Unreadable(f"cannot be used ({one_line(error)})") from error


def _to_rgb(image: Any, data: bytes, background: tuple[int, int, int]) -> Any:
    """Any Pillow mode to RGB."""
    from PIL import Image

    mode, clear = image.mode, image.info.get("transparency")
    depth = data[24] if image.format == "PNG" else 8  # in the header
    samples = None  # of 16 bits, which Pillow compares with `clear` in 8
    # Mode I is 16-bit too in these formats: Pillow scales a PGM of any depth to 0..65535.
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        samples = np.asarray(image).astype(np.int64)[..., None]
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose samples Pillow gives as stored
        pixels = (samples >> (tags.get(258, (16,))[0] - 8)).clip(0, 255).astype(np.uint8)
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow heeds up to 8 bits
            pixels = 255 - pixels
        pixels = pixels.repeat(3, axis=2)
    elif mode in ("I", "F"):
        raise ValueError(f"32-bit samples (Pillow mode {mode}), whose range is not known")
    elif mode == "RGB" and depth == 16 and clear is not None:
        pixels = np.array(image)
        with Image.open(io.BytesIO(data)) as low:  # Pillow gives high bytes: read the low ones too
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            samples = pixels.astype(np.int64) << 8 | np.asarray(low)
    if samples is not None:
        if clear is not None:
            pixels[(samples == clear).all(-1)] = background
        return Image.fromarray(pixels)
    if mode == "L" and clear is not None:  # which Pillow leaves at the depth of the file
        image.info["transparency"] *= 255 // ((1 << depth) - 1)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def crop(image: np.ndarray, size: int, *, kind: str = "adm", seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3), by one of `CROPS`.

    "adm" is the centre crop of ADM (Dhariwal and Nichol 2021), to the pixel: halve with a box
    filter while the short side is at least twice `size`, go on bicubically, cut the middle.
    "random" covers 0.8 to 1 of the short side at a random place, as in ADM; `seed` moves it.
    "resize" squashes: the aspect ratio is lost.
    """
    from PIL import Image

    picture = Image.fromarray(image)
    if kind not in CROPS:
        raise DataError(f"unknown crop {kind!r}: choose one of {', '.join(CROPS)}")
    if kind == "resize":
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    draw = np.random.Generator(np.random.Philox(seeded(seed, "crop")))
    short = size if kind == "adm" else int(draw.integers(size, math.ceil(size / 0.8) + 1))
    while min(picture.size) >= 2 * short:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = short / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if width * height > _MOST_PIXELS:
        raise Unreadable(f"too long and thin: would be {width} x {height} pixels when scaled")
    # Resizing only the box that is kept would be faster, but is not the same to the pixel.
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    room = np.array([height - size, width - size])
    top, left = room // 2 if kind == "adm" else (draw.random(2) * (room + 1)).astype(int)
    return scaled[top : top + size, left : left + size]
