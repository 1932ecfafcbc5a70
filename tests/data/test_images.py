"""One image: formats, what is rejected and why; crops, ADM's to the pixel."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from erw.data.images import Unreadable, crop, decode
from helpers.parts import picture
from helpers.reference import Golden


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_every_mode_becomes_rgb() -> None:
    pixels = picture(3)
    rgb = Image.fromarray(pixels)
    grey = rgb.convert("L")
    assert np.array_equal(decode(save(rgb, "PNG")), pixels)
    assert np.array_equal(decode(save(grey, "PNG"))[..., 1], np.asarray(grey))
    assert np.abs(decode(save(rgb, "WEBP", quality=95)).astype(int) - pixels).mean() < 3
    assert np.array_equal(decode(save(rgb.convert("CMYK"), "TIFF")), pixels)
    palette = rgb.quantize(64)
    assert np.array_equal(decode(save(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bits = np.asarray(grey).astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(save(Image.fromarray(bits), kind))[..., 0], np.asarray(grey))
    assert set(np.unique(decode(save(grey.convert("1"), "PNG")))) == {0, 255}


def tiff(samples: list[int], bits: int) -> bytes:
    """A TIFF of one row, of a depth that Pillow cannot write."""
    packed = sum(sample << bits * i for i, sample in enumerate(reversed(samples)))
    data = packed.to_bytes(len(samples) * bits // 8, "big")
    if bits == 16:
        data = np.array(samples, "<u2").tobytes()
    tags = {256: len(samples), 257: 1, 258: bits, 259: 1, 262: 1}
    tags |= {273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: len(data)}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4) + data


def test_deep_grey_keeps_its_range() -> None:
    seen = {
        "12 bits": decode(tiff([0, 0x7FF, 0x800, 0xFFF], 12)),
        "16 bits": decode(tiff([0, 0x7FFF, 0x8000, 0xFFFF], 16)),
    }
    for most in (4095, 65535):
        samples = np.array([0, most // 2, most // 2 + 1, most], ">u2").tobytes()
        seen[f"PGM to {most}"] = decode(b"P5 4 1 %d\n" % most + samples)
    for what, image in seen.items():
        assert image[0, :, 1].tolist() == [0, 127, 128, 255], what


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (80, 80, 80, 255))
    if mode == "P":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([0, 0, 0, 80, 80, 80])
        palette.putpixel((1, 0), 1)
        data = save(palette, "PNG", transparency=0)
    else:
        data = save(image.convert(mode), "PNG")
    assert decode(data).tolist() == [[[255] * 3, [80] * 3]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    pixels = picture(4)
    turned = decode(save(Image.fromarray(pixels), "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(pixels, -1))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def plain_png(row: bytes, width: int, depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG of one row, of a depth that Pillow cannot write."""
    head = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    data = zlib.compress(b"\0" + row)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_a_png_with_much_text_or_a_large_profile(kind: str) -> None:
    long = zlib.compress(bytes(range(32, 127)) * 30_000)
    more = chunk(b"zTXt", b"Comment\0\0" + long) if kind == "text" else chunk(
        b"iCCP", b"big\0\0" + long
    )  # fmt: skip
    assert decode(plain_png(bytes([7, 8, 9]), 1, 8, 2, more)).tolist() == [[[7, 8, 9]]]


def bomb() -> bytes:
    """A PNG of a few bytes whose header says 40,000 x 40,000 pixels."""
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, not an image at all", "not an image"),
        (save(Image.fromarray(picture(0)), "JPEG")[:400], "cannot be used .*[Tt]runcated"),
        (save(Image.fromarray(picture(0)), "PNG")[:900], "cannot be used .*[Tt]runcated"),
        (bomb(), "exceeds limit of .* pixels"),
        (save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "32-bit samples"),
    ],
    ids=["empty", "text", "short-jpeg", "short-png", "bomb", "float"],
)
def test_bad_images_are_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [64, 256])
def test_adm_centre_crop_is_exact_to_the_pixel(golden: Golden, size: int) -> None:
    data = golden("adm_center_crop")
    assert np.array_equal(crop(data["image"], size), data[f"crop{size}"])


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = picture(1, height=64, width=64)
    assert np.array_equal(crop(image, 64), image)


@pytest.mark.parametrize("shape", [(3, 500), (500, 3), (1, 1), (31, 33), (200, 100)])
def test_any_shape_gives_a_square(shape: tuple[int, int]) -> None:
    image = picture(2, height=shape[0], width=shape[1])
    assert crop(image, 32).shape == (32, 32, 3)


def test_a_thread_of_pixels_cannot_fill_the_memory() -> None:
    with pytest.raises(Unreadable, match="too long and thin"):
        crop(np.zeros((1, 60_000, 3), np.uint8), 256)


def keyed(bits: int, samples: list[int], key: int, *, rgb: bool = False) -> bytes:
    """A PNG of one row in grey, or RGB with equal channels, of which `key` is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    channels = 3 if rgb else 1
    values = [sample for sample in samples for _ in range(channels)]
    row = sum(value << bits * i for i, value in enumerate(reversed(values)))
    size = len(values) * bits
    packed = (row << -size % 8).to_bytes(-(-size // 8), "big")
    header = struct.pack(">IIBBBBB", len(samples), 1, bits, 2 if rgb else 0, 0, 0, 0)
    parts = {
        b"IHDR": header, b"tRNS": struct.pack(">H", key) * channels,
        b"IDAT": zlib.compress(b"\0" + packed), b"IEND": b"",
    }  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_meant_at_its_depth(bits: int) -> None:
    """Only its own value becomes white, of 16 bits not one that is equal in the upper eight."""
    most = 2**bits - 1
    samples = [0, 1, most] if bits < 8 else [0, 0x51, most] if bits == 8 else [0x5100, 0x51FF, most]
    key = samples[0] if bits == 16 else samples[1]
    expected = [255 if sample == key else sample * 255 // most for sample in samples]
    assert decode(keyed(bits, samples, key))[0, :, 0].tolist() == expected


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    with pytest.raises(Unreadable, match="transparent colour of 16 bits"):
        decode(keyed(16, [0x1234, 0x12FF], 0x1234, rgb=True))
    white = decode(keyed(8, [0x12, 0x13], 0x12, rgb=True))[0, :, 0]
    assert white.tolist() == [255, 0x13]
