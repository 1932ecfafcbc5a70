"""One image file to uint8 RGB, or a reason why not."""

import io
from pathlib import Path

import numpy as np

from erw.errors import DataError

WHITE = (255, 255, 255)
# What Pillow opens and people keep photographs in; documents, vector and array formats stay out.
_ENDINGS = (
    ".apng .avif .bmp .dds .dib .gif .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg "
    ".jpx .mpo .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi .tga .tif .tiff .webp"
)
EXTENSIONS = frozenset(_ENDINGS.split())


class Unreadable(DataError):
    """One image that cannot be used. The message is the reason alone, without the path."""


def decode(data: bytes | str | Path, *, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """Pixels of an image file (a path, or its bytes): uint8 (H, W, 3), upright by EXIF.

    Transparency is composited on `background`. Of 12- and 16-bit greyscale the upper eight bits are
    kept, as Pillow does for 16-bit RGB. Of animations and pages, the first. Raises `Unreadable`.
    """
    from PIL import Image

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
            return np.asarray(_upright(_to_rgb(image, background), image))
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
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in _TRANSPARENT or "transparency" in image.info:
                return "transparent"
            return "grey" if image.mode[0] in "1LIF" and image.mode != "LAB" else "colour"
    except Exception:  # `decode` says what is wrong with it
        return None


def _upright(pixels, image):  # type: ignore[no-untyped-def]
    """`pixels` turned as the EXIF block of `image` says, the rest of which may be anything."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(0x0112))
    except Exception:  # a block that cannot be read turns nothing
        turn = None
    return pixels if turn is None else pixels.transpose(turn)


_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


def _to_rgb(image, background: tuple[int, int, int]):  # type: ignore[no-untyped-def]
    """Any Pillow mode to RGB."""
    from PIL import Image

    # Mode I is 16-bit too in these formats: Pillow scales a PGM of any depth to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_deep_grey(image, background))
    if image.mode in ("I", "F"):
        raise Unreadable(f"32-bit samples (Pillow mode {image.mode}), whose range is not known")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image, background: tuple[int, int, int]) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Greyscale of 12 or 16 bits to uint8 (H, W, 3)."""
    samples = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose samples Pillow gives as they are stored
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    grey = (samples >> (bits - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation WhiteIsZero; Pillow heeds it up to 8 bits
        grey = 255 - grey
    rgb = np.repeat(grey[..., None], 3, axis=2)
    # Pillow compares a tRNS of 16 bits with samples of 8, so it would hide nothing.
    rgb[samples == image.info.get("transparency", -1)] = background
    return rgb
