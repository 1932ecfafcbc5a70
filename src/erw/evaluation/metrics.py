"""The registry of metrics: distances x features. A new kind of features is one entry in `SPACES`.

| distance | scores of "...-lite2"          | of                                                 |
| fd       | fd_lite2                       | Fréchet distance                                   |
| kid      | kid_lite2                      | kernel distance, cubic kernel, unbiased            |
| mmd      | mmd_lite2                      | kernel distance, Gaussian kernel, biased, x 1000   |
| pr       | precision_lite2, recall_lite2  | k-nearest-neighbour balls                          |
| dc       | density_lite2, coverage_lite2  | the same                                           |

Any distance goes with any of `SPACES`, and with any name that `erw.encoders.load_encoder` takes:
"fd-dinov2", "kid-dinov3-b". `NAMED` are published metrics that fix both.

Of ADM's (`evaluations/evaluator.py` of openai/guided-diffusion) sFID takes the first 7 channels of
`mixed_6/conv` (17 x 17 x 7 = 2,023), the others `pool_3`. A reference batch of ADM's
(`VIRTUAL_*.npz`) holds 10,000 images, and the mean and covariance of the full data set: these are
used for FID and sFID, the images for precision and recall (in float64).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from erw.config import nearest
from erw.errors import ConfigError, DataError
from erw.evaluation.distances import (
    Moments,
    cmmd,
    density_coverage,
    frechet,
    inception_score,
    kid,
    precision_recall,
)
from erw.evaluation.features import Extractor, PooledEncoder, Statistics
from erw.evaluation.inception import POOL, SPATIAL, Inception, load_inception
from erw.io import weight_hash

SPACES = {
    "lite0": "efficientnet-lite0",
    "lite2": "efficientnet-lite2",
    "inception": "inception",  # of 2015, see `erw.evaluation.inception`
    "dinov2": "dinov2-l@224",  # the class token of ViT-L/14 at 224 px, as dgm-eval
    "clip-embedding": "clip-l-336",
    "convnextv2": "convnextv2-b",
    "mae": "mae-l",
    "siglip2": "siglip2-so400m@224",
    "clip": "clip-l",
}
"""Space -> encoder, as `load_encoder` takes it."""
INCEPTION = "inception"
NEIGHBOURS = {"dinov2": 5}
"""k of precision and recall, else 3. dgm-eval (Stein et al., arXiv 2306.04675) has 5; it draws
10,000 images of either side and leaves a ball's edge out."""
STATED = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
"""What a reference batch may state: mean and covariance of `pool_3` and of spatial features."""


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


class Pair(NamedTuple):
    """Both sides in one space."""

    real: Statistics
    fake: Statistics
    extractor: Extractor
    space: str


def _fd(pair: Pair) -> float:
    """Of the features that are kept, where an encoder has more."""
    columns = pair.extractor.columns
    return frechet(pair.real.moments.part(columns), pair.fake.moments.part(columns))


def _sfid(pair: Pair) -> float:
    part = slice(POOL, POOL + SPATIAL)
    return frechet(pair.real.moments.part(part), pair.fake.moments.part(part))


def _inception_score(pair: Pair) -> float:
    """Without the bias, in splits of 5,000 in the images' order."""
    net = pair.extractor.encoder.net  # type: ignore[attr-defined]
    parts = pair.fake.features.to(net.fc.weight.device).split(5000)
    return inception_score(torch.cat([net.logits(part).cpu() for part in parts]))


Distance = Callable[[Pair], float | tuple[float, float]]
DISTANCES: dict[str, Distance] = {
    "fd": _fd,
    "kid": lambda p: kid(p.real.features, p.fake.features),
    "mmd": lambda p: cmmd(p.real.features, p.fake.features),
    "pr": lambda p: precision_recall(
        p.real.features, p.fake.features, k=NEIGHBOURS.get(p.space, 3)
    ),
    "dc": lambda p: density_coverage(p.real.features, p.fake.features),
}
PUBLISHED: dict[str, Distance] = {
    "fid": _fd,
    "sfid": _sfid,
    "is": _inception_score,
    "cmmd": DISTANCES["mmd"],
}
SCORES = {"pr": ("precision", "recall"), "dc": ("density", "coverage"), "is": ("inception_score",)}
"""Distance -> names of its scores, where it is not its own."""
FROM_MOMENTS = ("fd", "fid", "sfid")
"""Distances that do not need the features of every image."""


class Metric(NamedTuple):
    """One distance, by name, in one space; `suffix` ends the names of its scores."""

    distance: str
    space: str
    suffix: str = ""

    def scores(self, pair: Pair) -> dict[str, float]:
        """Scores by name."""
        names = SCORES.get(self.distance, (self.distance,))
        value = (DISTANCES | PUBLISHED)[self.distance](pair)
        values = value if isinstance(value, tuple) else (value,)
        names = tuple(f"{name}{self.suffix}".replace("-", "_") for name in names)
        return dict(zip(names, values, strict=True))


NAMED = {name: [Metric(name, INCEPTION)] for name in ("fid", "sfid", "is", "pr", "kid")}
NAMED["adm"] = NAMED["fid"] + NAMED["sfid"] + NAMED["is"] + NAMED["pr"]
NAMED["cmmd"] = [Metric("cmmd", "clip-embedding")]


def metrics_of(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of these names, each once. Raises ConfigError for an unknown one."""
    if not names:
        raise ConfigError("no metric: give at least one, such as fd-lite2")
    metrics: list[Metric] = []
    for name in names:
        distance, _, space = name.partition("-")
        if name in NAMED:
            metrics += NAMED[name]
        elif distance in DISTANCES and space:
            metrics.append(Metric(distance, space, f"_{space}"))
        else:
            every = [*NAMED, *(f"{distance}-{space}" for distance in DISTANCES for space in SPACES)]
            raise ConfigError(f"unknown metric {name!r}{nearest(name, every)}")
    return tuple(dict.fromkeys(metrics))


def extractors_of(
    metrics: Sequence[Metric],
    encoder: PooledEncoder | None = None,
    weights: str | Path | None = None,
    *,
    device: str = "cpu",
) -> dict[str, Extractor]:
    """The networks that the metrics need, by space; `encoder` in place of the only one.

    `weights` is a file of Inception's.
    """
    from erw.encoders.registry import load_encoder

    spaces = list(dict.fromkeys(metric.space for metric in metrics))
    if weights and INCEPTION not in spaces:
        raise ConfigError(f"weights {weights} are without effect: no metric is of Inception")
    if encoder is not None and len(spaces) > 1:
        raise ConfigError(f"metrics of {', '.join(spaces)} mix features: one encoder was given")
    extractors = {}
    for space in spaces:
        net = encoder
        if net is None and space == INCEPTION:
            net = AdmFeatures(load_inception(weights, device=device))
        elif net is None:
            net = load_encoder(SPACES.get(space, space), device=device)
        weights_hash = weight_hash(net) if isinstance(net, nn.Module) else net.name
        keep = any(m.distance not in FROM_MOMENTS for m in metrics if m.space == space)
        extractors[space] = Extractor(net, weights_hash, keep)
    return extractors


def with_stated(images: Statistics, path: Path) -> tuple[Statistics, bool]:
    """Statistics of a `.npz`'s images, with the mean and covariance that the file states, and
    whether it states any. Raises DataError where some are missing or not of this network."""
    with np.load(path, allow_pickle=False) as arrays:
        stated = {name: arrays[name] for name in STATED if name in arrays.files}
    if not stated:
        return images, False
    shapes = {name: array.shape for name, array in stated.items()}
    if shapes != STATED:
        raise DataError(f"{path} states statistics of shapes {shapes}: expected {STATED}")
    # The file states no count; its covariances are of full rank, so of more images than dimensions.
    count = max(images.moments.count, POOL + SPATIAL + 1)
    mu, sigma, mu_s, sigma_s = (torch.from_numpy(stated[name]).double() for name in STATED)
    scatter = torch.block_diag(sigma, sigma_s).mul_(count - 1)
    moments = Moments(count, torch.cat([mu, mu_s]), scatter)
    return dataclasses.replace(images, moments=moments), True
