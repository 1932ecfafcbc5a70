"""Scores of a set of images against a reference, and the metrics by name: distances x features.

| distance | scores of "...-lite2"          | of                                                 |
| fd       | fd_lite2                       | Fréchet distance                                   |
| kid      | kid_lite2                      | kernel distance, cubic kernel, unbiased            |
| mmd      | mmd_lite2                      | kernel distance, Gaussian kernel, biased, x 1000   |
| pr       | precision_lite2, recall_lite2  | k-nearest-neighbour balls                          |
| dc       | density_lite2, coverage_lite2  | the same                                           |

Any distance goes with any of `SPACES`, and with any name that `erw.encoders.load_encoder` takes:
"fd-dinov2", "kid-dinov3-b". `NAMED` are published metrics that fix both. "fd-lite2" is never called
FID, which is that distance under Inception of 2015. A new kind of features is an entry in `SPACES`.

Of ADM's (`evaluations/evaluator.py` of openai/guided-diffusion) sFID takes the first 7 channels of
`mixed_6/conv` (17 x 17 x 7 = 2,023), the others `pool_3`. A reference batch of ADM's
(`VIRTUAL_*.npz`) holds 10,000 images, and the mean and covariance of the full data set: these are
used for FID and sFID, the images for precision and recall (in float64).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from erw.config import nearest
from erw.dist import World
from erw.encoders.registry import load_encoder
from erw.errors import ConfigError, DataError
from erw.evaluation import distances, features
from erw.evaluation.distances import Moments
from erw.evaluation.features import Extractor, PooledEncoder, Statistics
from erw.evaluation.images import Images, image_set
from erw.evaluation.inception import POOL, SPATIAL, load_inception
from erw.io import cache_home, opened_npz, weight_hash

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


class Metric(NamedTuple):
    """The names of its scores, their values, and the space that they are taken in.

    `of` gets the statistics of both sides, the encoder and the space; `keeps`: it needs the
    features of every image, not the moments alone.
    """

    scores: tuple[str, ...]
    of: Callable[[Statistics, Statistics, Any, str], Any]
    keeps: bool = True
    space: str = INCEPTION


def _frechet(real: Statistics, fake: Statistics, part: slice) -> float:
    return distances.frechet(real.moments.part(part), fake.moments.part(part))


def _inception_score(_: Statistics, fake: Statistics, net: Any, space: str) -> float:
    """Without the bias, in splits of 5,000 in the images' order."""
    parts = fake.features.to(net.fc.weight.device).split(5000)
    return distances.inception_score(torch.cat([net.logits(part).cpu() for part in parts]))


def _precision_recall(x: Statistics, y: Statistics, _: Any, space: str) -> tuple[float, float]:
    return distances.precision_recall(x.features, y.features, k=NEIGHBOURS.get(space, 3))


DISTANCES = {
    "fd": Metric(
        ("fd",), lambda x, y, net, _: _frechet(x, y, slice(getattr(net, "kept", None))), keeps=False
    ),
    "kid": Metric(("kid",), lambda x, y, *_: distances.kid(x.features, y.features)),
    "mmd": Metric(("mmd",), lambda x, y, *_: distances.cmmd(x.features, y.features)),
    "pr": Metric(("precision", "recall"), _precision_recall),
    "dc": Metric(
        ("density", "coverage"), lambda x, y, *_: distances.density_coverage(x.features, y.features)
    ),
}
"""Metrics of any space."""
NAMED = {
    "fid": DISTANCES["fd"]._replace(scores=("fid",)),
    "sfid": Metric(("sfid",), lambda x, y, *_: _frechet(x, y, slice(POOL, None)), keeps=False),
    "is": Metric(("inception_score",), _inception_score),
    "pr": DISTANCES["pr"],
    "kid": DISTANCES["kid"],
    "cmmd": DISTANCES["mmd"]._replace(scores=("cmmd",), space="clip-embedding"),
}
"""Published metrics, whose space is fixed."""
ADM = ("fid", "sfid", "is", "pr")


def metrics_of(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of these names, each once. Raises ConfigError for an unknown one."""
    if not names:
        raise ConfigError("no metric: give at least one, such as fd-lite2")
    metrics: list[Metric] = []
    for name in names:
        distance, _, space = name.partition("-")
        if name == "adm" or name in NAMED:
            metrics += [NAMED[one] for one in (ADM if name == "adm" else (name,))]
        elif distance in DISTANCES and space:
            metric, suffix = DISTANCES[distance], space.replace("-", "_")
            scores = tuple(f"{score}_{suffix}" for score in metric.scores)
            metrics.append(metric._replace(scores=scores, space=space))
        else:
            every = ["adm", *NAMED, *(f"{one}-{space}" for one in DISTANCES for space in SPACES)]
            raise ConfigError(f"unknown metric {name!r}{nearest(name, every)}")
    return tuple(dict.fromkeys(metrics))


def extractors_of(
    metrics: Sequence[Metric], encoder: PooledEncoder | None = None,
    weights: str | Path | None = None, *, device: str = "cpu",
) -> dict[str, Extractor]:  # fmt: skip
    """The networks that the metrics need, by space; `encoder` in place of the only one.

    `weights` is a file of Inception's.
    """
    keeps = {m.space: any(n.keeps for n in metrics if n.space == m.space) for m in metrics}
    if weights and INCEPTION not in keeps:
        raise ConfigError(f"weights {weights} are without effect: no metric is of Inception")
    if encoder is not None and len(keeps) > 1:
        raise ConfigError(f"metrics of {', '.join(keeps)} mix features: one encoder was given")
    extractors = {}
    for space, keep in keeps.items():
        net: Any = encoder
        if net is None and space == INCEPTION:
            net = load_inception(weights, device=device)
        elif net is None:
            net = load_encoder(SPACES.get(space, space), device=device)
        identity = weight_hash(net) if isinstance(net, nn.Module) else net.name
        extractors[space] = Extractor(net, identity, getattr(net, "kept", None) if keep else 0)
    return extractors


def with_stated(images: Statistics, path: Path) -> tuple[Statistics, bool]:
    """Statistics of a `.npz`'s images, with the mean and covariance that the file states, and
    whether it states any. Raises DataError where some are missing or not of this network."""
    with opened_npz(path) as arrays:
        stated = {name: arrays[name] for name in STATED if name in arrays}
    if not stated:
        return images, False
    shapes = {name: array.shape for name, array in stated.items()}
    if shapes != STATED:
        raise DataError(f"{path} states statistics of shapes {shapes}: expected {STATED}")
    # The file states no count; its covariances are of full rank, so of more images than dimensions.
    count = max(images.moments.count, POOL + SPATIAL + 1)
    mu, sigma, mu_s, sigma_s = (torch.from_numpy(stated[name]).double() for name in STATED)
    scatter = torch.block_diag(sigma, sigma_s).mul_(count - 1)
    return Statistics(Moments(count, torch.cat([mu, mu_s]), scatter), images.features), True


@dataclass(frozen=True)
class Scores:
    """The result of `evaluate`, and what it depends on.

    `resolution`: (height, width), before the encoder's own resizing. `settings`: how the images
    were generated, if that is known. `reference_statistics`: "images", or "stated", of an `.npz` of
    ADM's. `features`: score -> its encoder, and the hash of its weights.
    """

    values: dict[str, float]
    count: int
    reference_count: int
    images: str
    images_hash: str
    reference: str
    reference_hash: str
    resolution: tuple[int, int]
    settings: dict[str, Any] | None
    reference_statistics: str
    features: dict[str, dict[str, str]]

    def __getitem__(self, name: str) -> float:
        """A score by its name, "fd_lite2" or "fd-lite2"."""
        return self.values[name.replace("-", "_")]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def evaluate(
    images: Images, *, reference: Images, metric: str | Sequence[str] = "fd-lite2",
    encoder: PooledEncoder | None = None, weights: str | Path | None = None, batch_size: int = 64,
    cache: str | Path | None = None, device: str = "cpu", world: World = features.ALONE,
    progress: features.Progress | None = None,
) -> Scores:  # fmt: skip
    """Score `images` against `reference`, whose statistics are stored.

    Args:
        images, reference: uint8 tensor (N, 3, H, W), a `Generation`, a source, a cache with images,
            or the path of a folder, a zip, a cache or a `.npz` with `arr_0`.
        metric: one or several, as in the table of this module.
        encoder: the network itself in place of the one that `metric` names.
        weights: file of the Inception network's weights.
        cache: folder for the reference's statistics; None: in the user's cache folder.
        world: the ranks that share the images; all call this, all get the scores.
        progress: as for `erw.evaluation.features.extract`.

    Raises ConfigError for an unknown metric, DataError for images that cannot be compared,
    NumericsError where they or their features are not finite.
    """
    metrics = metrics_of([metric] if isinstance(metric, str) else metric)
    fake = image_set(images)
    real = image_set(reference, what="reference", like=fake)
    folder = Path(cache or cache_home() / "statistics")
    options: dict[str, Any] = {"batch_size": batch_size, "world": world}
    extractors = extractors_of(metrics, encoder, weights, device=device)
    expected, stated = features.extract_stored(real, extractors, folder, **options), False
    if INCEPTION in expected and str(reference).endswith(".npz"):
        expected[INCEPTION], stated = with_stated(expected[INCEPTION], Path(str(reference)))
    statistics = features.extract(fake, extractors, progress=progress, **options)

    def score() -> Scores:
        values: dict[str, float] = {}
        networks: dict[str, dict[str, str]] = {}
        for names, distance, _, space in metrics:
            network, weights_hash, _ = extractors[space]
            result = distance(expected[space], statistics[space], network, space)
            values |= zip(names, result if len(names) > 1 else (result,), strict=True)
            meta = {"encoder": network.name, "weights": weights_hash}
            networks |= dict.fromkeys(names, meta)
        return Scores(
            values=values, count=fake.count, reference_count=real.count,
            images=fake.name, images_hash=fake.content,
            reference=real.name, reference_hash=real.content,
            resolution=fake.resolution, settings=fake.settings,
            reference_statistics="stated" if stated else "images", features=networks,
        )  # fmt: skip

    return world.broadcast(score)
