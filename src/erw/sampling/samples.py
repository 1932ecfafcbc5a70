"""What generation gives: a record of a batch, and the records of many batches as one."""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """A batch of samples.

    seeds: their seeds. labels (B,) int64, None when unconditional. latents (B, C, h, w) float32, as
    the network gives them (shifted and scaled). images (B, 3, H, W) uint8, None without a VAE.
    evaluations: how often the network was asked for each; a guided evaluation counts once.
    """

    seeds: tuple[int, ...]
    labels: Tensor | None
    latents: Tensor
    images: Tensor | None
    evaluations: tuple[int, ...]


def joined(batches: Iterable[Samples]) -> Samples:
    """All samples as one record, on the CPU; each batch is moved there before the next is asked."""
    columns = (
        (b.seeds, _cpu(b.labels), b.latents.cpu(), _cpu(b.images), b.evaluations) for b in batches
    )
    seeds, labels, latents, images, evaluations = zip(*columns, strict=True)
    return Samples(
        tuple(chain.from_iterable(seeds)),
        None if labels[0] is None else torch.cat(labels),
        torch.cat(latents),
        None if images[0] is None else torch.cat(images),
        tuple(chain.from_iterable(evaluations)),
    )


def _cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.cpu()
