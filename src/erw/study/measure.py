"""Scoring a point of a study: FD-Lite2 of samples, the floors under it, and the pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from erw.data.sources import Source
from erw.encoders import Encoder, load_encoder
from erw.errors import CacheError
from erw.evaluate.distances import Moments, frechet_moments

ENCODER = "efficientnet-lite2"
GRID = 16
BLOCK = 64

Tick = Callable[[int], None]


def nothing(_images: int) -> None:
    """A progress callback that does nothing."""


class Scorer:
    """FD-Lite2 against one set of held-out images, whose moments are computed once."""

    def __init__(self, reference: Moments, encoder: Encoder) -> None:
        self.reference, self.encoder = reference, encoder

    @classmethod
    def cached(
        cls, source: Source, path: Path, *, device: str = "cpu", tick: Tick = nothing
    ) -> Scorer:
        """A scorer against all images of `source`; their moments are kept in the file `path`.

        Raises CacheError if the file is of other images or damaged.
        """
        encoder = load_encoder(ENCODER, device=device)
        if not path.exists():
            found = moments(blocks(source), encoder, tick=tick)
            tensors = {"mean": found.mean, "scatter": found.scatter}
            header = {"count": str(found.count), "source": source.fingerprint()}
            write_bytes(save(tensors, metadata=header), path)
            return cls(found, encoder)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                mean, scatter = file.get_tensor("mean"), file.get_tensor("scatter")
        except SafetensorError as error:
            raise CacheError(f"{path} is damaged ({error}); delete it and start again") from error
        if header.get("source") != source.fingerprint():
            raise CacheError(f"{path} is of other held-out images; delete it and start again")
        tick(len(source))
        return cls(Moments(int(header["count"]), mean, scatter), encoder)

    def score(self, images: Iterator[Tensor], *, tick: Tick = nothing) -> float:
        """FD-Lite2 of blocks of images, uint8 (B, 3, H, W)."""
        return frechet_moments(self.reference, moments(images, self.encoder, tick=tick))


def moments(images: Iterator[Tensor], encoder: Encoder, *, tick: Tick = nothing) -> Moments:
    """Mean and covariance of the pooled features of blocks of images."""

    def features() -> Iterator[Tensor]:
        for block in images:
            for part in block.split(BLOCK):
                with torch.no_grad():
                    yield encoder.pooled(part.to(next(encoder.parameters()).device)).cpu()
                tick(len(part))

    return Moments.of(features())


def blocks(source: Source, *, size: int = BLOCK) -> Iterator[Tensor]:
    """A source's images in order, uint8 (B, 3, H, W), `size` at a time."""
    for start in range(0, len(source), size):
        rows = [source[i][0] for i in range(start, min(start + size, len(source)))]
        yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def reconstructed(images: Iterator[Tensor], vae: Any) -> Iterator[Tensor]:
    """Images through the VAE: encoded to the mean latent and decoded."""
    with torch.no_grad():
        for block in images:
            raw = vae.encode(block)[:, : vae.channels]
            yield vae.decode((raw - vae.shift) * vae.scale)


class Floors(NamedTuple):
    """Scores of `count` real images, as many as there are samples at a point.

    `vae_reconstruction`: other held-out images after encoding and decoding. `train_images`: images
    of the training split.
    """

    vae_reconstruction: float
    train_images: float


def floors(
    scorer: Scorer, held_out: Source, training: Source, *, vae: Any, tick: Tick = nothing
) -> Floors:
    """The two floors, from images that are not the reference's own."""
    through = scorer.score(reconstructed(blocks(held_out), vae), tick=tick)
    return Floors(through, scorer.score(blocks(training), tick=tick))


def grid_png(images: Tensor, *, columns: int = 4, gap: int = 4) -> bytes:
    """Images uint8 (N, 3, H, W) in a square grid as PNG, the gaps transparent."""
    from PIL import Image

    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    canvas = Image.new("RGBA", size, (0, 0, 0, 0))
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        place = ((i % columns) * (width + gap), (i // columns) * (height + gap))
        canvas.paste(Image.fromarray(image), place)
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def write_bytes(content: bytes, path: Path) -> None:
    """Write beside the name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    os.replace(beside, path)
