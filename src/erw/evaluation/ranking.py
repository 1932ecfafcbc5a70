"""Which encoder suits some images: what its patch tokens know of them, and what that costs."""

import time
from typing import Any

import torch
from torch import Tensor

from erw.data.statistics import statistics
from erw.encoders.base import Encoder
from erw.evaluation.alignment import knn_accuracy, spatial_structure


@torch.no_grad()
def rate(encoder: Encoder, images: Tensor, labels: Tensor, origins: Tensor) -> dict[str, Any]:
    """Numbers by name, for uint8 images (n, 3, s, s), their classes (n,) and what each was made
    from (n,). `knn` is of an image's mean token, all standardised over the images; None for one
    class. Raises DataError where they do not suit the encoder, or are fewer than 10."""
    side, began = images.shape[-1], time.perf_counter()
    tokens = [encoder(batch).cpu() for batch in images.split(16)]
    seconds, grid, stats = time.perf_counter() - began, encoder.grid(side), statistics(tokens)
    means = stats.standardized(torch.cat([z.mean(1) for z in tokens]))
    return {
        "encoder": encoder.name,
        "grid": grid,
        "width": encoder.dim,
        "spatial": sum(spatial_structure(z, grid) * len(z) for z in tokens) / len(images),
        "knn": knn_accuracy(means, labels, origins) if len(labels.unique()) > 1 else None,
        "nearness": stats.nearness,
        "gflops": encoder.flops(side) / 1e9,
        "seconds": seconds / len(images),
    }
