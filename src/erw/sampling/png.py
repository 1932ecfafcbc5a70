"""Generated images as PNGs, named by seed; what is known of each stands in its text chunks."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np


def png_path(folder: Path, seed: int) -> Path:
    """Where the image of a seed is."""
    return folder / f"{seed:08d}.png"


def write_png(path: Path, image: np.ndarray, text: Mapping[str, int]) -> None:
    """Write an image (H, W, 3) uint8 with its text, whole or not at all."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, str(value))
    picture = Image.fromarray(np.ascontiguousarray(image))
    replace_file(
        path, lambda file: picture.save(file, format="PNG", pnginfo=info, compress_level=1)
    )


def read_png(path: Path) -> np.ndarray:
    """The image (H, W, 3) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def png_text(path: Path, name: str) -> str | None:
    """What the image says under a name; None: nothing."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(name)


def replace_file(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write beside and rename: a file that is there is whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w+b") as file:
            fill(file)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
