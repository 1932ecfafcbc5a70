"""The registry of metrics: distances x features, and families that fix both.

| distance | scores                  | name of the scores of "...-lite2"      |
| fd       | Fréchet distance        | fd_lite2                               |
| kid      | kernel distance         | kid_lite2                              |
| pr       | precision and recall    | precision_lite2, recall_lite2          |
| dc       | density and coverage    | density_lite2, coverage_lite2          |

Features are "lite0" and "lite2" (EfficientNet-Lite, in the package) and "inception" (`pool_3` of
2015, whose weights are given by a file). "adm" is a family: all five scores of ADM's evaluator.
One more kind of features is one entry in `FEATURES` and in `ENCODERS` of `erw.encoders.registry`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from erw.config import nearest
from erw.errors import ConfigError
from erw.evaluate.adm import AdmFeatures, adm_scores
from erw.evaluate.distances import frechet_moments, kid
from erw.evaluate.features import PooledEncoder, Statistics
from erw.evaluate.manifold import density_coverage, precision_recall


class Distance(NamedTuple):
    """How to compare (reference, images, encoder): scores by name; from moments or all features."""

    compare: Callable[[Statistics, Statistics, PooledEncoder], Mapping[str, float]]
    needs_features: bool


class Metric(NamedTuple):
    """Distances on one kind of features; `suffix` ends the names of the scores."""

    distances: tuple[Distance, ...]
    features: str
    suffix: str

    @property
    def needs_features(self) -> bool:
        return any(distance.needs_features for distance in self.distances)

    def scores(
        self, real: Statistics, fake: Statistics, encoder: PooledEncoder
    ) -> dict[str, float]:
        """All scores by name."""
        values: dict[str, float] = {}
        for distance in self.distances:
            for name, value in distance.compare(real, fake, encoder).items():
                values[f"{name}{self.suffix}".replace("-", "_")] = value
        return values


def _kept(found: Statistics) -> Tensor:
    assert found.features is not None
    return found.features


DISTANCES: dict[str, Distance] = {
    "fd": Distance(lambda a, b, _: {"fd": frechet_moments(a.moments, b.moments)}, False),
    "kid": Distance(lambda a, b, _: {"kid": kid(_kept(a), _kept(b)).mean}, True),
    "pr": Distance(lambda a, b, _: precision_recall(_kept(a), _kept(b))._asdict(), True),
    "dc": Distance(lambda a, b, _: density_coverage(_kept(a), _kept(b))._asdict(), True),
}
FEATURES = {"lite0": "efficientnet-lite0", "lite2": "efficientnet-lite2", "inception": "inception"}
FAMILIES = {"adm": Metric((Distance(adm_scores, True),), "adm", "")}
WEIGHTED = ("inception", "adm")
"""Features whose weights come from a file."""


def metric_of(names: list[str]) -> Metric:
    """The metric that names ask for together; all must be of one kind of features.

    Raises ConfigError for an unknown name (the nearest is named) or a mixture.
    """
    if not names:
        raise ConfigError("no metric: give at least one, such as fd-lite2")
    distances: list[Distance] = []
    kinds: set[str] = set()
    for name in names:
        distance, _, kind = name.partition("-")
        if name in FAMILIES:
            distances += FAMILIES[name].distances
            kinds.add(name)
        elif distance in DISTANCES and kind:
            distances.append(DISTANCES[distance])
            kinds.add(kind)
        else:
            known = [f"{name}-{kind}" for name in DISTANCES for kind in FEATURES] + list(FAMILIES)
            raise ConfigError(f"unknown metric {name!r}{nearest(name, known)}")
    if len(kinds) > 1:
        raise ConfigError(f"metrics {', '.join(names)} mix features: evaluate once for each")
    kind = kinds.pop()
    return Metric(tuple(distances), kind, "" if kind in FAMILIES else f"_{kind}")


class Features(NamedTuple):
    """An encoder, and the file its weights are from, with its hash ("": the package's own)."""

    encoder: PooledEncoder
    file: str


def load_features(kind: str, *, weights: str | Path | None = None, device: str = "cpu") -> Features:
    """The encoder of one kind of features.

    Raises:
        ConfigError: an unknown kind, or `weights` for features that take none.
        FileNotFoundError, CheckpointError: see `erw.evaluate.inception_weights.load_inception`.
    """
    if kind in WEIGHTED:
        from erw.evaluate.inception_weights import load_inception

        loaded = load_inception(weights, device=device)
        file = f"{loaded.file} sha256 {loaded.sha256}"
        return Features(AdmFeatures(loaded.net) if kind == "adm" else loaded.net, file)
    if weights is not None:
        raise ConfigError(
            f"weights {weights} are without effect on {kind} features, which bring their own; "
            f"leave them out, or choose a metric of {' or '.join(WEIGHTED)}"
        )
    from erw.encoders.registry import load_encoder

    return Features(load_encoder(FEATURES.get(kind, kind), device=device), "")
