"""One image file to uint8 RGB, and to a square of some size; or a reason why not."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from erw.errors import DataError
from erw.rng import seeded

CROPS = ("adm", "resize", "random")
WHITE = (255, 255, 255)
# What Pillow opens and people keep photographs in; documents, vector and array formats stay out.
_ENDINGS = (
    ".apng .avif .bmp .dds .dib .gif .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .mpo .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi .tga .tif .tiff .webp"
)
EXTENSIONS = frozenset(_ENDINGS.split())
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation to Pillow's Transpose


class Unreadable(DataError):
    """One image that cannot be used. The message is the reason alone, without the path."""


def decode(data: bytes | str | Path, *, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Pixels of an image file (a path, or its bytes): uint8 (H, W, 3), upright by EXIF.

    Transparency is composited on `background`. Of 12- and 16-bit greyscale the upper eight bits are
    taken, as Pillow does for 16-bit RGB. Of animations and pages, the first. Raises `Unreadable`.
    """
    Image = _pillow()
    try:
        raw = data if isinstance(data, bytes) else Path(data).read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from error
    if not raw:
        raise Unreadable("empty file")
    try:
        with Image.open(io.BytesIO(raw)) as image:
            limit = Image.MAX_IMAGE_PIXELS or 1 << 62
            if image.width * image.height > limit:  # Pillow only warns up to twice this
                raise Image.DecompressionBombError
            image.load()
            return np.asarray(_upright(_to_rgb(image, raw, background), image))
    except Unreadable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise Unreadable("not an image that Pillow knows") from error
    except MemoryError as error:
        raise Unreadable("does not fit in memory") from error
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"damaged or truncated ({reason})") from error


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


def _upright(pixels: Any, image: Any) -> Any:
    """`pixels` turned by the EXIF block of `image`, the rest of which may be anything."""
    try:
        turn = _TURNS.get(image.getexif().get(0x0112))
    except Exception:  # a block that cannot be read turns nothing
        turn = None
    return pixels if turn is None else pixels.transpose(turn)


def _to_rgb(image: Any, raw: bytes, background: tuple[int, int, int]) -> Any:
    """Any Pillow mode to RGB."""
    from PIL import Image

    # Mode I is 16-bit too in these formats: Pillow scales a PGM of any depth to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_deep_grey(image, background))
    if image.mode in ("I", "F"):
        raise Unreadable(f"32-bit samples (Pillow mode {image.mode}), whose range is not known")
    if image.format == "PNG" and "transparency" in image.info:
        depth = raw[24]  # in the header; Pillow leaves the transparent colour at this depth
        if image.mode == "L":
            image.info["transparency"] *= 255 // ((1 << depth) - 1)
        elif image.mode == "RGB" and depth == 16:
            return Image.fromarray(_deep_colour(image, raw, background))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Any, background: tuple[int, int, int]) -> np.ndarray:
    """Greyscale of 12 or 16 bits to uint8 (H, W, 3)."""
    samples = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose samples Pillow gives as they are stored
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    grey = (samples >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation WhiteIsZero, which Pillow reads up to 8 bits
        grey = 255 - grey
    rgb = np.repeat(grey[..., None], 3, axis=2)
    # Pillow compares a tRNS of 16 bits with samples of 8, so it would hide nothing.
    rgb[samples == image.info.get("transparency", -1)] = background
    return rgb


def _deep_colour(image: Any, raw: bytes, background: tuple[int, int, int]) -> np.ndarray:
    """A PNG of 16 bits a colour, one of which is transparent, to uint8 (H, W, 3)."""
    pixels = np.array(image)
    with _pillow().open(io.BytesIO(raw)) as low:  # Pillow gives high bytes: read the low ones too
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        samples = pixels.astype(np.int64) << 8 | np.asarray(low)
    pixels[(samples == image.info["transparency"]).all(-1)] = background
    return pixels


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
    return _short_side(image, size, size, place=None)


def random_crop(
    image: np.ndarray, size: int, *, seed: int, smallest: float = 0.8, largest: float = 1.0
) -> np.ndarray:
    """A square of a random place and scale: it covers 0.8 to 1 of the short side, as in ADM."""
    draw = np.random.Generator(np.random.Philox(seeded(seed, "crop")))
    low, high = math.ceil(size / largest), math.ceil(size / smallest)
    short = int(draw.integers(low, high + 1))
    top, left = draw.random(2)
    return _short_side(image, size, short, place=(float(top), float(left)))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Squash to a square, bicubic with antialiasing; the aspect ratio is lost."""
    from PIL import Image

    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


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
    if place is None:
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top = int(place[0] * (height - size + 1))
        left = int(place[1] * (width - size + 1))
    if width * height > (Image.MAX_IMAGE_PIXELS or 1 << 62):
        raise Unreadable(f"too long and thin: would be {width} x {height} pixels when scaled")
    # Resizing only the box that is kept would be faster, but is not the same to the pixel.
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    return scaled[top : top + size, left : left + size]
