"""Scoring with FD-Lite2 in a study: the held-out reference, the floors, and small pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erw.data.sources import Source
from erw.encoders import VAE, Encoder, load_encoder
from erw.evaluation.evaluate import evaluate
from erw.evaluation.features import Statistics, load_statistics, save_statistics, statistics
from erw.evaluation.images import Images, image_set

ENCODER = "efficientnet-lite2"
GRID = 16
BLOCK = 64

Tick = Callable[[int], None]


def nothing(_images: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class Scorer:
    """FD-Lite2 against one set of held-out images, whose statistics are known."""

    reference: Statistics
    encoder: Encoder

    def score(self, images: Images, *, tick: Tick = nothing) -> float:
        """FD-Lite2 of images, as `erw.evaluate` gives it; `tick` hears of each batch."""
        found = evaluate(
            images,
            reference=self.reference,
            encoder=self.encoder,
            batch_size=BLOCK,
            progress=tick,
        )
        return found["fd_lite2"]


def scorer(source: Source, folder: Path, *, device: str = "cpu", tick: Tick = nothing) -> Scorer:
    """A scorer against all images of `source`; their statistics are kept in `folder`.

    Raises DataError if the file with the statistics is damaged.
    """
    encoder = load_encoder(ENCODER, device=device)
    path = folder / f"held_out-{source.fingerprint()[:16]}.safetensors"
    if path.exists():
        tick(len(source))
        return Scorer(load_statistics(path), encoder)
    found = statistics(image_set(source), encoder, batch_size=BLOCK, progress=tick)
    save_statistics(path, found)
    return Scorer(found, encoder)


def first_images(source: Source, count: int) -> Tensor:
    """The first images of a source, uint8 (count, 3, H, W)."""
    return torch.from_numpy(np.stack([source[i][0] for i in range(count)])).permute(0, 3, 1, 2)


def reconstructed(images: Tensor, vae: VAE) -> Tensor:
    """Images through the VAE: encoded to the mean latent and decoded."""

    def parts() -> Iterator[Tensor]:
        shift, scale = vae.scaling
        for part in images.split(BLOCK):
            raw = vae.encode(part)[:, : vae.channels]
            yield vae.decode((raw - shift) * scale).cpu()

    return torch.cat(list(parts()))


class Floors(NamedTuple):
    """Scores of real images, as many as there are samples at a point.

    `vae_reconstruction`: other held-out images after encoding and decoding. `train_images`: images
    of the training split.
    """

    vae_reconstruction: float
    train_images: float


def floors(
    against: Scorer, held_out: Tensor, training: Source, *, vae: VAE, tick: Tick = nothing
) -> Floors:
    """The two floors, from images that are not the reference's own."""
    through = against.score(reconstructed(held_out, vae), tick=tick)
    return Floors(through, against.score(training, tick=tick))
