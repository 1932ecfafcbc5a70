"""Scores of a set of images against a reference, with everything that they depend on.

A metric is called DISTANCE-FEATURES: "fd-lite2" is the Fréchet distance between pooled features of
EfficientNet-Lite2. It is never called FID, which is that distance under Inception of 2015: the
metrics "fid" and "adm" give it. `erw.evaluation.metrics` has the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from erw import __version__
from erw.dist import World
from erw.errors import ConfigError
from erw.evaluation.adm import with_stated
from erw.evaluation.features import (
    ALONE,
    Extractor,
    PooledEncoder,
    Progress,
    Statistics,
    extract,
    extract_stored,
)
from erw.evaluation.images import Images, ImageSet, image_set, same_resolution
from erw.evaluation.metrics import INCEPTION, Pair, Weights, extractors_of, metrics_of
from erw.io import cache_home


@dataclass(frozen=True)
class Scores:
    """The result of `evaluate`, and what it depends on.

    Attributes:
        values: score by name.
        count, reference_count: images on either side.
        images, reference, validation: their names, and hashes of their content; "" without.
        resolution: (height, width) of the images, before the encoder's own resizing.
        settings: how the images were generated, where that is known.
        reference_statistics: "images", or "stated": the mean and covariance in ADM's `.npz`.
        features: score -> its encoder, the hash of the encoder's weights, and name and SHA-256 of
            their file ("": the package's or the hub's).
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
    validation: str = ""
    validation_hash: str = ""
    versions: dict[str, str] = field(
        default_factory=lambda: {"erw": __version__, "torch": torch.__version__}
    )

    def __getitem__(self, name: str) -> float:
        """A score by its name, "fd_lite2" or "fd-lite2"."""
        return self.values[name.replace("-", "_")]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def evaluate(
    images: Images,
    *,
    reference: Images,
    metric: str | Sequence[str] = "fd-lite2",
    encoder: PooledEncoder | None = None,
    weights: Weights | None = None,
    validation: Images | None = None,
    batch_size: int = 64,
    cache: str | Path | None = None,
    device: str = "cpu",
    world: World = ALONE,
    progress: Progress | None = None,
) -> Scores:
    """Score `images` against `reference`, whose statistics are stored.

    Args:
        images: uint8 tensor (N, 3, H, W), a `Generation`, a source, a cache with images, or the
            path of a folder, a zip, a cache or a `.npz` with `arr_0`.
        reference: the same. With "fid" and "sfid" the mean and covariance that a `.npz` states are
            used, as ADM does.
        metric: one or several, see `erw.evaluation.metrics`.
        encoder: the network itself in place of the one that `metric` names.
        weights: file of the Inception network's weights, or space -> file or folder of weights.
        validation: held-out real images, which FDr is relative to.
        cache: folder for the reference's statistics; None: in the user's cache folder.
        world: the ranks that share the images; all call this, all get the scores.
        progress: is given the number of images after each batch of this rank.

    Raises:
        ConfigError: an unknown metric, FDr without validation images.
        DataError: fewer than 2 images, wrong dtype or shape, another resolution than the reference.
        NumericsError: images or features that are not finite.
    """
    metrics = metrics_of([metric] if isinstance(metric, str) else metric)
    relative = {m.space for m in metrics if m.distance == "fdr"}
    if relative and validation is None:
        raise ConfigError("FDr is relative to held-out real images: give them (--validation)")
    fake = image_set(images)
    folder = Path(cache) if cache is not None else cache_home() / "statistics"
    extractors: dict[str, Extractor] = {}
    # The first rank downloads missing weights before the others look for them.
    world.broadcast(
        lambda: extractors.update(extractors_of(metrics, encoder, weights, device=device))
    )
    extractors = extractors or extractors_of(metrics, encoder, weights, device=device)
    options: dict[str, Any] = {"batch_size": batch_size, "world": world}
    real = _reference(reference, extractors, folder, fake, "reference", **options)
    held_out = None
    if relative:
        some = {space: extractors[space] for space in relative}
        held_out = _reference(validation, some, folder, fake, "validation set", **options)
    extracted = extract(fake, list(extractors.values()), progress=progress, **options)
    statistics = dict(zip(extractors, extracted, strict=True))

    def score() -> Scores:
        values: dict[str, float] = {}
        features: dict[str, dict[str, str]] = {}
        for metric in metrics:
            space, one = metric.space, extractors[metric.space]
            other = held_out.statistics.get(space) if held_out else None
            pair = Pair(real.statistics[space], statistics[space], one, space, other)
            scores = metric.scores(pair)
            values |= scores
            meta = {"encoder": one.encoder.name, "weights": one.weights, "file": one.file}
            features |= dict.fromkeys(scores, meta)
        return Scores(
            values=values,
            count=fake.count,
            reference_count=real.images.count,
            images=fake.name,
            images_hash=fake.content,
            reference=real.images.name,
            reference_hash=real.images.content,
            resolution=fake.resolution,
            settings=fake.settings,
            reference_statistics="stated" if real.stated else "images",
            features=features,
            validation=held_out.images.name if held_out else "",
            validation_hash=held_out.images.content if held_out else "",
        )

    return world.broadcast(score)


class _Reference(NamedTuple):
    """Statistics by space, complete on the first rank, and what they are of.

    `stated`: a file's own mean and covariance take the place of those of its images.
    """

    statistics: dict[str, Statistics]
    images: ImageSet
    stated: bool


def _reference(
    given: Any,
    extractors: Mapping[str, Extractor],
    folder: Path,
    fake: ImageSet,
    what: str,
    **options: Any,
) -> _Reference:
    """Statistics of a reference, stored or extracted."""
    images, stated = image_set(given, what=what), False
    same_resolution(fake.resolution, images.resolution, fake.name, f"the {what} {images.name}")
    statistics = extract_stored(images, extractors, folder, **options)
    if INCEPTION in statistics and str(given).endswith(".npz"):
        statistics[INCEPTION], stated = with_stated(statistics[INCEPTION], Path(str(given)))
    return _Reference(statistics, images, stated)
