"""Scores of a set of images against a reference, with everything that they depend on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from erw.dist import World
from erw.evaluation.features import ALONE, PooledEncoder, Progress, extract, extract_stored
from erw.evaluation.images import Images, image_set
from erw.evaluation.metrics import INCEPTION, extractors_of, metrics_of, with_stated
from erw.io import cache_home


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
    cache: str | Path | None = None, device: str = "cpu", world: World = ALONE,
    progress: Progress | None = None,
) -> Scores:  # fmt: skip
    """Score `images` against `reference`, whose statistics are stored.

    Args:
        images, reference: uint8 tensor (N, 3, H, W), a `Generation`, a source, a cache with images,
            or the path of a folder, a zip, a cache or a `.npz` with `arr_0`; the mean and
            covariance that a reference's `.npz` states are used for fid and sfid, as ADM does.
        metric: one or several, see `erw.evaluation.metrics`.
        encoder: the network itself in place of the one that `metric` names.
        weights: file of the Inception network's weights.
        cache: folder for the reference's statistics; None: in the user's cache folder.
        world: the ranks that share the images; all call this, all get the scores.
        progress: is given the number of images after each batch of this rank.

    Raises ConfigError for an unknown metric, DataError for images that cannot be compared,
    NumericsError where they or their features are not finite.
    """
    metrics = metrics_of([metric] if isinstance(metric, str) else metric)
    fake = image_set(images)
    real = image_set(reference, what="reference", like=fake)
    folder = Path(cache or cache_home() / "statistics")
    options: dict[str, Any] = {"batch_size": batch_size, "world": world}
    extractors = extractors_of(metrics, encoder, weights, device=device)
    expected, stated = extract_stored(real, extractors, folder, **options), False
    if INCEPTION in expected and str(reference).endswith(".npz"):
        expected[INCEPTION], stated = with_stated(expected[INCEPTION], Path(str(reference)))
    statistics = extract(fake, extractors, progress=progress, **options)

    def score() -> Scores:
        values: dict[str, float] = {}
        features: dict[str, dict[str, str]] = {}
        for names, distance, _, space in metrics:
            network, weights_hash, _ = extractors[space]
            result = distance(expected[space], statistics[space], network, space)
            values |= zip(names, result if len(names) > 1 else (result,), strict=True)
            meta = {"encoder": network.name, "weights": weights_hash}
            features |= dict.fromkeys(names, meta)
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
        )

    return world.broadcast(score)
