"""What a cache will take on disk, part by part, before any image is encoded."""

import math
from typing import Any, NamedTuple

from erw.data.codec import FORMATS

_BYTES = {"float16": 2, "bfloat16": 2}
MARKS = 12  # label int32 and number of the image int64


class Part(NamedTuple):
    """One column of a cache: what it holds, of which shape and type, and bytes an image."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    def line(self, images: int) -> str:
        """One row of the table that `erw prepare --dry-run` prints."""
        shape = "x".join(map(str, self.shape))
        return (
            f"{self.name:<34}{f'{shape} {self.dtype}':<24}{self.bytes:>12,}"
            f"{readable(self.bytes * images):>14}"
        )


def parts(settings: dict[str, Any]) -> tuple[Part, ...]:
    """The columns of a cache made with these settings (see `settings.describe`).

    Headers of shards and records are left out: some 1,000 bytes a shard.
    """
    variants = 2 if settings["flip"] else 1
    mirrored = (2,) if settings["flip"] else ()
    channels, height, width = settings["latent_shape"]
    size = settings["image_size"]
    found = [Part("label and number", (2,), "int32 int64", MARKS)]
    moments = (*mirrored, 2 * channels, height, width)
    latents = f"latents of {settings['vae']['name']}"
    found.append(Part(latents, moments, "float16", 2 * math.prod(moments)))
    if settings["images"]:
        found.append(Part("images", (3, size, size), "uint8", 3 * size**2))
    for encoder in settings["encoders"]:
        tokens = math.prod(encoder["grid"]) * variants
        shape = (*mirrored, *encoder["grid"], encoder["dim"])
        kind = encoder["format"]
        count = tokens * token_bytes(encoder["dim"], kind)
        found.append(Part(f"features of {encoder['name']}", shape, kind, count))
        if width := encoder.get("class_dim", 0):
            name = f"class token of {encoder['name']}"
            found.append(Part(name, (*mirrored, width), "float16", 2 * width * variants))
    return tuple(found)


def token_bytes(dim: int, kind: str) -> int:
    """Bytes of one token of `dim` numbers; 8-bit formats have a float32 scale beside them."""
    assert kind in FORMATS, kind
    return dim * _BYTES[kind] if kind in _BYTES else dim + 4


def table(settings: dict[str, Any], *, images: int) -> str:
    """The parts of a cache of so many images, a line each, and their sum."""
    found = parts(settings)
    total = sum(part.bytes for part in found)
    head = f"{'part':<34}{'shape':<24}{'bytes/image':>12}{'in all':>14}"
    last = f"{'all':<58}{total:>12,}{readable(total * images):>14}"
    return "\n".join([head, *(part.line(images) for part in found), last])


def readable(size: float) -> str:
    """Bytes in megabytes, or gigabytes from 10 GB on."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.1f} MB"
