"""Scores of a set of images against a reference, with everything that they depend on.

A metric is called DISTANCE-FEATURES: "fd-lite2" is the Fréchet distance between pooled features of
EfficientNet-Lite2. It is never called FID, which is that distance under Inception of 2015: the
metrics "fid" and "adm" give it. `erw.evaluation.metrics` has the table.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
        images, reference, validation: their names, and hashes of their content; "" without.
        resolution: (height, width) of the images, before the encoder's own resizing.
        settings: how the images were generated, where that is known.
        reference_statistics: "images", or "stated": the mean and covariance in ADM's `.npz`.
        features: score -> its encoder, the hash of its weights, and name and SHA-256 of their file.
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
        images, reference: uint8 tensor (N, 3, H, W), a `Generation`, a source, a cache with images,
            or the path of a folder, a zip, a cache or a `.npz` with `arr_0`; the mean and
            covariance that a reference's `.npz` states are used for fid and sfid, as ADM does.
        metric: one or several, see `erw.evaluation.metrics`.
        encoder: the network itself in place of the one that `metric` names.
        weights: file of the Inception network's weights, or space -> file or folder of weights.
        validation: held-out real images, which FDr is relative to.
        cache: folder for the reference's statistics; None: in the user's cache folder.
        world: the ranks that share the images; all call this, all get the scores.
        progress: is given the number of images after each batch of this rank.

    Raises ConfigError for an unknown metric, DataError for images that cannot be compared,
    NumericsError where they or their features are not finite.
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

    def opened(given: Images, what: str, *spaces: str) -> tuple[ImageSet, dict[str, Statistics]]:
        other = image_set(given, what=what)
        same_resolution(fake, other, what)
        chosen = {space: extractors[space] for space in spaces}
        return other, extract_stored(other, chosen, folder, **options)

    real, expected = opened(reference, "reference", *extractors)
    stated = False
    if INCEPTION in expected and str(reference).endswith(".npz"):
        expected[INCEPTION], stated = with_stated(expected[INCEPTION], Path(str(reference)))
    held_out, validated = None, dict[str, Statistics]()
    if relative and validation is not None:
        held_out, validated = opened(validation, "validation set", *relative)
    extracted = extract(fake, list(extractors.values()), progress=progress, **options)
    statistics = dict(zip(extractors, extracted, strict=True))

    def score() -> Scores:
        values: dict[str, float] = {}
        features: dict[str, dict[str, str]] = {}
        for metric in metrics:
            space, one = metric.space, extractors[metric.space]
            pair = Pair(expected[space], statistics[space], one, space, validated.get(space))
            scores = metric.scores(pair)
            values |= scores
            meta = {"encoder": one.encoder.name, "weights": one.weights, "file": one.file}
            features |= dict.fromkeys(scores, meta)
        return Scores(
            values=values,
            count=fake.count,
            reference_count=real.count,
            images=fake.name,
            images_hash=fake.content,
            reference=real.name,
            reference_hash=real.content,
            resolution=fake.resolution,
            settings=fake.settings,
            reference_statistics="stated" if stated else "images",
            features=features,
            validation=held_out.name if held_out else "",
            validation_hash=held_out.content if held_out else "",
        )

    return world.broadcast(score)
