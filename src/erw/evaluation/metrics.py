"""The registry of metrics: distances x features. A new kind of features is one entry in `SPACES`.

| distance | scores of "...-lite2"          | of                                                 |
| fd       | fd_lite2                       | Fréchet distance                                   |
| fdr      | fdr_lite2                      | FD over the FD of held-out real images             |
| kid      | kid_lite2                      | kernel distance, cubic kernel, unbiased            |
| mmd      | mmd_lite2                      | kernel distance, Gaussian kernel, biased, x 1000   |
| pr       | precision_lite2, recall_lite2  | k-nearest-neighbour balls                          |
| dc       | density_lite2, coverage_lite2  | the same                                           |

Any distance goes with any of `SPACES`, and with any name that `erw.encoders.load_encoder` takes:
"fd-dinov2", "kid-dinov3-b". `NAMED` are published metrics that fix both.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from erw.config import nearest
from erw.errors import ConfigError, DataError
from erw.evaluation.adm import AdmFeatures, frechet_part, score_of_classes
from erw.evaluation.distances import cmmd, density_coverage, frechet, kid, precision_recall
from erw.evaluation.features import Extractor, PooledEncoder, Statistics
from erw.io import hash_tensors

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
Weights = str | Path | Mapping[str, str | Path]


class Pair(NamedTuple):
    """Both sides in one space, and held-out real images."""

    real: Statistics
    fake: Statistics
    extractor: Extractor
    space: str
    held_out: Statistics | None = None


def _fd(pair: Pair) -> float:
    """Of the features that are kept, where an encoder has more."""
    columns = pair.extractor.columns
    return frechet(pair.real.moments.part(columns), pair.fake.moments.part(columns))


def _ratio(pair: Pair) -> float:
    """FD(images, reference) / FD(held-out images, reference); 1 is as good as real images.

    Source: Yang et al., Representation Fréchet Loss (arXiv 2604.28190), who average six spaces.
    """
    assert pair.held_out is not None
    least = _fd(pair._replace(fake=pair.held_out))
    if least <= 1e-9 * pair.real.moments.cov.trace().item():
        raise DataError("the validation images are the reference itself: give held-out images")
    return _fd(pair) / least


Distance = Callable[[Pair], float | tuple[float, float]]
DISTANCES: dict[str, Distance] = {
    "fd": _fd,
    "fdr": _ratio,
    "kid": lambda p: kid(p.real.features, p.fake.features),
    "mmd": lambda p: cmmd(p.real.features, p.fake.features),
    "pr": lambda p: precision_recall(
        p.real.features, p.fake.features, k=NEIGHBOURS.get(p.space, 3)
    ),
    "dc": lambda p: density_coverage(p.real.features, p.fake.features),
}
PUBLISHED: dict[str, Distance] = {
    "fid": lambda p: frechet_part("fid", p.real, p.fake),
    "sfid": lambda p: frechet_part("sfid", p.real, p.fake),
    "is": lambda p: score_of_classes(p.fake, p.extractor.encoder),
    "cmmd": DISTANCES["mmd"],
}
SCORES = {"pr": ("precision", "recall"), "dc": ("density", "coverage"), "is": ("inception_score",)}
"""Distance -> names of its scores, where it is not its own."""
FROM_MOMENTS = ("fd", "fdr", "fid", "sfid")
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
    weights: Weights | None = None,
    *,
    device: str = "cpu",
) -> dict[str, Extractor]:
    """The networks that the metrics need, by space; `encoder` in place of the only one."""
    from erw.encoders.registry import load_encoder
    from erw.evaluation.inception import load_inception

    spaces = list(dict.fromkeys(metric.space for metric in metrics))
    files = dict(weights) if isinstance(weights, Mapping) else {INCEPTION: weights}
    if unused := [space for space, path in files.items() if path and space not in spaces]:
        raise ConfigError(f"weights of {unused[0]} are without effect: no metric is of {unused[0]}")
    if encoder is not None and len(spaces) > 1:
        raise ConfigError(f"metrics of {', '.join(spaces)} mix features: one encoder was given")
    extractors = {}
    for space in spaces:
        net, path, file = encoder, files.get(space), ""
        if net is None and space == INCEPTION:
            inception = load_inception(path, device=device)
            net, file = AdmFeatures(inception), inception.file
        elif net is None:
            entry, at, side = SPACES.get(space, space).partition("@")
            net = load_encoder(entry + (f"={path}" if path else "") + at + side, device=device)
        weights_hash = hash_tensors(net) if isinstance(net, nn.Module) else net.name
        keep = any(m.distance not in FROM_MOMENTS for m in metrics if m.space == space)
        extractors[space] = Extractor(net, weights_hash, file, keep)
    return extractors
