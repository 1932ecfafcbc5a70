"""The metrics of ADM's evaluator as one family: FID, sFID, Inception Score, precision, recall.

sFID takes the first 7 channels of `mixed_6/conv` (17 x 17 x 7 = 2,023), the others `pool_3`, the
Inception Score without the bias and in splits of 5,000 in the images' order. A reference batch of
ADM's (`VIRTUAL_*.npz`) holds 10,000 images, and the mean and covariance of the full data set: these
are used for FID and sFID, the images for precision and recall (in float64).

Source: `evaluations/evaluator.py` of openai/guided-diffusion.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from erw.errors import DataError
from erw.evaluation.distances import Moments, frechet, inception_score
from erw.evaluation.features import PooledEncoder, Statistics
from erw.evaluation.inception import POOL, SPATIAL, Inception

SPLIT = 5000
PARTS = {"fid": slice(0, POOL), "sfid": slice(POOL, POOL + SPATIAL)}
# what a reference batch may state: mean and covariance of `pool_3` and of the spatial features
SIZES = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


class AdmFeatures(nn.Module):
    """An encoder of `pool_3` and the spatial features, of which only the former are kept."""

    name = "inception-2015-adm"
    kept = POOL

    def __init__(self, net: Inception) -> None:
        super().__init__()
        self.net = net

    def pooled(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> (B, 2048 + 2023)."""
        return torch.cat(self.net(images), 1)


def frechet_part(name: str, real: Statistics, fake: Statistics) -> float:
    part = PARTS[name]
    return frechet(real.moments.part(part), fake.moments.part(part))


def score_of_classes(fake: Statistics, encoder: PooledEncoder) -> float:
    """The Inception Score, from features in the images' order."""
    assert isinstance(encoder, AdmFeatures) and fake.features is not None
    pool = fake.features.to(encoder.net.fc.weight.device)
    logits = torch.cat([encoder.net.logits(part).cpu() for part in pool.split(SPLIT)])
    return inception_score(logits, split_size=SPLIT)


def with_stated(images: Statistics, path: Path) -> tuple[Statistics, bool]:
    """Statistics of a `.npz`'s images, with the mean and covariance that the file states, and
    whether it states any. Raises DataError where some are missing or not of this network."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stated = {name: arrays[name] for name in SIZES if name in arrays.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} states damaged statistics: {error}") from None
    if not stated:
        return images, False
    shapes = {name: array.shape for name, array in stated.items()}
    if shapes != SIZES:
        raise DataError(f"{path} states statistics of shapes {shapes}: expected {SIZES}")
    # The file states no count; its covariances are of full rank, so of more images than dimensions.
    count = max(images.moments.count, POOL + SPATIAL + 1)
    mu, sigma, mu_s, sigma_s = (torch.from_numpy(stated[name]).double() for name in SIZES)
    scatter = torch.block_diag(sigma, sigma_s).mul_(count - 1)
    moments = Moments(count, torch.cat([mu, mu_s]), scatter)
    return dataclasses.replace(images, moments=moments), True
