"""One image file to uint8 RGB, and to a square of some size; or a reason why not."""

import contextlib
import io
import time
from typing import Any

import numpy as np

from erw.errors import DataError, one_line

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


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image file: uint8 (H, W, 3), upright by EXIF.

    Transparency is composited on white. Of 16-bit greyscale the upper eight bits are taken, as
    Pillow does for 16-bit RGB. Of animations and pages, the first. Raises `Unreadable`.
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
            pixels = _to_rgb(image, data[24] if image.format == "PNG" else 8)
            with contextlib.suppress(Exception):  # an EXIF block that cannot be read turns nothing
                pixels = pixels.transpose(_TURNS[image.getexif()[0x0112]])
            return np.asarray(pixels)
    except Image.UnidentifiedImageError as error:
        raise Unreadable("not an image that Pillow knows") from error
    except Exception as error:  # damaged files raise anything: OSError, SyntaxError, struct.error
        raise Unreadable(f"cannot be used ({one_line(error)})") from error


def _to_rgb(image: Any, bits: int) -> Any:
    """`bits`: of a PNG's sample, in which its transparent colour is given."""
    from PIL import Image

    key = image.info.get("transparency")
    # Mode I is 16-bit too in these formats: Pillow scales a PGM of any depth to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        depth = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # of a TIFF
        samples = np.asarray(image).astype(np.int64)
        samples = np.where(samples == key, 255, samples >> (depth - 8)).clip(0, 255)
        return Image.fromarray(samples.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit samples (Pillow mode {image.mode}), whose range is not known")
    if isinstance(key, tuple) and bits == 16:
        raise ValueError("a transparent colour of 16 bits, of which Pillow reads 8: save RGBA")
    if isinstance(key, int) and bits < 8 and image.mode in ("1", "L"):
        image.info["transparency"] = key * 255 // (2**bits - 1)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*WHITE, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def crop(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3): the centre crop of ADM (Dhariwal and Nichol 2021), to the
    pixel. Halve with a box filter while the short side is at least twice `size`, go on
    bicubically, cut the middle."""
    from PIL import Image

    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        halved = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halved, Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    if width * height > _MOST_PIXELS:
        raise Unreadable(f"too long and thin: would be {width} x {height} pixels when scaled")
    # Resizing only the box that is kept would be faster, but is not the same to the pixel.
    scaled = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return scaled[top : top + size, left : left + size]


def decoding_rate(size: int, *, seconds: float = 1.0) -> float:
    """Photographs that a core of this machine decodes and crops to `size` a second, measured over
    so many seconds of its time: JPEGs of 500 x 375 pixels and 110 kB, as ImageNet's are."""
    from PIL import Image

    file, coarse = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (94, 125, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=93)
    count, start = 0, time.thread_time()  # the core's, whatever else the machine does
    while (spent := time.thread_time() - start) < seconds or not count:
        crop(decode(file.getvalue()), size)
        count += 1
    return count / spent
