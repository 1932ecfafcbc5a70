"""The size table of the documentation is what `erw prepare --dry-run` computes."""

import re
from pathlib import Path

from erw.data.forecast import parts, readable, table

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
IMAGENET = 1_281_167
LATENTS = {
    "4 x 32 x 32": (4, 32, 32),
    "16 x 32 x 32": (16, 32, 32),
    "32 x 16 x 16": (32, 16, 16),
}
WIDTHS = {
    "efficientnet-lite0": 112,
    "dinov2-s, dinov3-s": 384,
    "dinov2-b, dino-b, dinov3-b, mocov3-b, siglip2-b": 768,
    "dinov2-l, dinov3-l, clip-l, mae-l, mocov3-l, siglip2-l": 1024,
    "siglip2-so400m": 1152,
    "ijepa-h": 1280,
    "dinov2-g": 1536,
}


def settings(latent: tuple[int, int, int], *, dim: int = 0, kind: str = "float16", **more) -> dict:
    encoder = {"name": "e", "grid": [16, 16], "dim": dim, "format": kind}
    base = {"flip": False, "images": False, "image_size": 256, "vae": {"name": "v"}}
    return base | {"latent_shape": latent, "encoders": [encoder] if dim else []} | more


def rows() -> list[str]:
    """The table of the page."""
    found = []
    for name, latent in LATENTS.items():
        size = parts(settings(latent))[1].bytes
        found.append(f"| latents {name} | {size:,} | {readable(size * IMAGENET)} |")
    size = parts(settings((4, 32, 32), images=True))[2].bytes
    found.append(f"| images (`--images`) | {size:,} | {readable(size * IMAGENET)} |")
    for name, dim in WIDTHS.items():
        for kind in ("float16", "int8"):  # float8 takes what int8 does
            size = parts(settings((4, 32, 32), dim=dim, kind=kind))[2].bytes
            shown = "float16, bfloat16" if kind == "float16" else kind
            found.append(f"| {name}: {shown} | {size:,} | {readable(size * IMAGENET)} |")
    return found


def test_the_pages_size_table() -> None:
    text = PAGE.read_text("utf-8").split("## Size")[1]
    told = [line for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)][2:]
    assert told == rows()


def test_flipped_rows_take_twice_the_bytes() -> None:
    once = parts(settings((4, 32, 32), dim=768, images=True))
    twice = parts(settings((4, 32, 32), dim=768, images=True, flip=True))
    factors = [b.bytes / a.bytes for a, b in zip(once, twice, strict=True)]
    assert factors == [1, 2, 1, 2]
    text = table(settings((4, 32, 32), dim=768), images=IMAGENET)
    assert text.splitlines()[-1].split() == ["all", "409,612", "524.8", "GB"]
