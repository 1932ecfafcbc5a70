"""Scores of a set of images against a reference, with everything that they depend on.

A metric is called DISTANCE-FEATURES: "fd-lite2" is the Fréchet distance between pooled features of
EfficientNet-Lite2. It is never called FID, which is that distance under another network.

| distance | scores                  | name of the scores of "...-lite2"      |
| fd       | Fréchet distance        | fd_lite2                               |
| kid      | kernel distance         | kid_lite2                              |
| pr       | precision and recall    | precision_lite2, recall_lite2          |
| dc       | density and coverage    | density_lite2, coverage_lite2          |
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw import __version__
from erw.config import nearest
from erw.errors import ConfigError, DataError
from erw.evaluate.distances import Moments, frechet_moments, kid
from erw.evaluate.features import (
    PooledEncoder,
    Statistics,
    cached_statistics,
    load_statistics,
    statistics,
)
from erw.evaluate.inputs import Images, image_set
from erw.evaluate.manifold import density_coverage, precision_recall
from erw.sample.generate import weights_hash

Reference = Images | Moments | Statistics


class Distance(NamedTuple):
    """How to compare (reference, images): scores by name, from moments or from all features."""

    compare: Callable[[Statistics, Statistics], Mapping[str, float]]
    needs_features: bool


def _kept(found: Statistics) -> Tensor:
    assert found.features is not None
    return found.features


DISTANCES: dict[str, Distance] = {
    "fd": Distance(lambda a, b: {"fd": frechet_moments(a.moments, b.moments)}, False),
    "kid": Distance(lambda a, b: {"kid": kid(_kept(a), _kept(b)).mean}, True),
    "pr": Distance(lambda a, b: precision_recall(_kept(a), _kept(b))._asdict(), True),
    "dc": Distance(lambda a, b: density_coverage(_kept(a), _kept(b))._asdict(), True),
}
FEATURES = {"lite0": "efficientnet-lite0", "lite2": "efficientnet-lite2"}


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found, and how.

    Attributes:
        values: score by name.
        count, reference_count: images on either side.
        images, reference: their names; the hashes tell which they were ("" for a generation).
        encoder, encoder_weights: the network of the features and the hash of its weights.
        resolution: (height, width) of the images, before the encoder's own resizing.
        settings: how the images were generated, where that is known.
    """

    values: dict[str, float]
    count: int
    reference_count: int
    images: str
    images_hash: str
    reference: str
    reference_hash: str
    encoder: str
    encoder_weights: str
    resolution: tuple[int, int]
    settings: dict[str, Any] | None = None
    versions: dict[str, str] = field(
        default_factory=lambda: {"erw": __version__, "torch": torch.__version__}
    )

    def __getitem__(self, name: str) -> float:
        """A score by its name, "fd_lite2" or "fd-lite2"."""
        key = name.replace("-", "_")
        if key not in self.values:
            raise KeyError(f"no score {name!r}; there are {', '.join(self.values)}")
        return self.values[key]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def evaluate(
    images: Images,
    *,
    reference: Reference,
    metric: str | Sequence[str] = "fd-lite2",
    encoder: PooledEncoder | None = None,
    batch_size: int = 64,
    cache: str | Path | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score `images` against `reference`.

    Args:
        images: uint8 tensor (N, 3, H, W), a `Generation` or its `Samples`, a source, or the path of
            a folder, a zip or a `.npz` with `arr_0`.
        reference: the same, or `Moments` or `Statistics` made before, or their `.safetensors` file.
        metric: one or several of one kind of features, see the table of this module.
        encoder: the network itself in place of the one that `metric` names.
        batch_size: images per forward pass.
        cache: folder for the reference's statistics; None: the user's cache folder.
        progress: is given the number of images after each batch.

    Raises:
        ConfigError: an unknown metric.
        DataError: fewer than 2 images, wrong dtype or shape, another resolution than the reference.
        NumericsError: features that are not finite.
    """
    metrics = [metric] if isinstance(metric, str) else list(metric)
    distances, suffix = _parse(metrics)
    keep = any(distance.needs_features for distance in distances)
    given = image_set(images)
    if encoder is None:
        from erw.encoders.registry import load_encoder

        encoder = load_encoder(FEATURES.get(suffix, suffix), device=device)
    weights = weights_hash(encoder) if isinstance(encoder, nn.Module) else encoder.name
    kind = f"{encoder.name.replace('/', '_')}-{weights}"
    real, name, content = _reference(
        reference, encoder, kind=kind, keep=keep, batch_size=batch_size, cache=cache
    )
    fake = statistics(given, encoder, keep=keep, batch_size=batch_size, progress=progress)
    _same_resolution(fake, real, given.name, name)
    values: dict[str, float] = {}
    for distance in distances:
        found = distance.compare(real, fake)
        values |= {f"{score}_{suffix}".replace("-", "_"): value for score, value in found.items()}
    assert fake.resolution is not None
    return Scores(
        values=values,
        count=fake.moments.count,
        reference_count=real.moments.count,
        images=given.name,
        images_hash=given.content,
        reference=name,
        reference_hash=content,
        encoder=encoder.name,
        encoder_weights=weights,
        resolution=fake.resolution,
        settings=given.settings,
    )


def _parse(metrics: list[str]) -> tuple[list[Distance], str]:
    """The distances that metrics name, and the kind of features that all of them share."""
    if not metrics:
        raise ConfigError("no metric: give at least one, such as fd-lite2")
    distances, kinds = [], set()
    for metric in metrics:
        distance, _, kind = metric.partition("-")
        if distance not in DISTANCES or not kind:
            known = [f"{name}-{kind}" for name in DISTANCES for kind in FEATURES]
            raise ConfigError(f"unknown metric {metric!r}{nearest(metric, known)}")
        distances.append(DISTANCES[distance])
        kinds.add(kind)
    if len(kinds) > 1:
        raise ConfigError(f"metrics {', '.join(metrics)} mix features: evaluate once for each")
    return distances, kinds.pop()


def _reference(
    reference: Reference,
    encoder: PooledEncoder,
    *,
    kind: str,
    keep: bool,
    batch_size: int,
    cache: str | Path | None,
) -> tuple[Statistics, str, str]:
    """Statistics, name and content hash of the reference."""
    if isinstance(reference, str | Path) and str(reference).endswith(".safetensors"):
        name, reference = Path(reference).name, load_statistics(reference)
    else:
        name = "statistics"
    if isinstance(reference, Moments):
        reference = Statistics(reference)
    if isinstance(reference, Statistics):
        if keep and reference.features is None:
            raise DataError(
                f"the reference {name} holds moments alone, enough for fd; "
                "give its images for kid, pr and dc"
            )
        return reference, name, ""
    real = image_set(reference, what="reference")
    found = cached_statistics(
        real, encoder, weights=kind, keep=keep, batch_size=batch_size, folder=cache
    )
    return found, real.name, real.content


def _same_resolution(fake: Statistics, real: Statistics, images: str, reference: str) -> None:
    if real.resolution is not None and fake.resolution != real.resolution:
        a, b = (" x ".join(map(str, (s.resolution or ())[::-1])) for s in (fake, real))
        raise DataError(
            f"images {images} are {a}, the reference {reference} is {b}: scores would compare sizes"
        )
