"""Scores of a set of images against a reference, with everything that they depend on.

A metric is called DISTANCE-FEATURES: "fd-lite2" is the Fréchet distance between pooled features of
EfficientNet-Lite2. It is never called FID, which is that distance under Inception of 2015: the
metric "adm" gives it. `erw.evaluate.metrics` has the table.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from erw import __version__
from erw.errors import DataError
from erw.evaluate.adm import AdmFeatures, with_stated
from erw.evaluate.distances import Moments
from erw.evaluate.features import (
    PooledEncoder,
    Statistics,
    cached_statistics,
    load_statistics,
    statistics,
)
from erw.evaluate.inputs import Images, image_set
from erw.evaluate.metrics import load_features, metric_of
from erw.sample.generate import weights_hash

Reference = Images | Moments | Statistics


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found, and how.

    Attributes:
        values: score by name.
        count, reference_count: images on either side.
        images, reference: their names; the hashes tell which they were ("" for a generation).
        encoder, encoder_weights: the network of the features and the hash of its weights.
        encoder_file: name and SHA-256 of the file they are from; "": the package's own.
        reference_statistics: "images", or "stated": the mean and covariance in ADM's `.npz`.
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
    encoder_file: str = ""
    reference_statistics: str = "images"
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
    weights: str | Path | None = None,
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
            With "adm" the mean and covariance that a `.npz` states are used, as ADM does.
        metric: one or several of one kind of features, see `erw.evaluate.metrics`.
        encoder: the network itself in place of the one that `metric` names.
        weights: file of the Inception network's weights, for "adm" and "...-inception".
        batch_size: images per forward pass.
        cache: folder for the reference's statistics; None: the user's cache folder.
        progress: is given the number of images after each batch.

    Raises:
        ConfigError: an unknown metric.
        DataError: fewer than 2 images, wrong dtype or shape, another resolution than the reference.
        NumericsError: features that are not finite.
        FileNotFoundError, CheckpointError: weights that are missing or not Inception's.
    """
    asked = metric_of([metric] if isinstance(metric, str) else list(metric))
    given = image_set(images)
    file = ""
    if encoder is None:
        encoder, file = load_features(asked.features, weights=weights, device=device)
    hashed = weights_hash(encoder) if isinstance(encoder, nn.Module) else encoder.name
    keep = asked.needs_features
    real = _reference(
        reference,
        encoder,
        kind=f"{encoder.name.replace('/', '_')}-{hashed}",
        keep=keep,
        batch_size=batch_size,
        cache=cache,
    )
    fake = statistics(given, encoder, keep=keep, batch_size=batch_size, progress=progress)
    _same_resolution(fake, real.statistics, given.name, real.name)
    assert fake.resolution is not None
    return Scores(
        values=asked.scores(real.statistics, fake, encoder),
        count=fake.moments.count,
        reference_count=real.images,
        images=given.name,
        images_hash=given.content,
        reference=real.name,
        reference_hash=real.content,
        encoder=encoder.name,
        encoder_weights=hashed,
        resolution=fake.resolution,
        settings=given.settings,
        encoder_file=file,
        reference_statistics="stated" if real.stated else "images",
    )


class _Real(NamedTuple):
    """A reference: its statistics, name, content hash, images, and whether it stated moments."""

    statistics: Statistics
    name: str
    content: str
    images: int
    stated: bool = False


def _reference(
    reference: Reference,
    encoder: PooledEncoder,
    *,
    kind: str,
    keep: bool,
    batch_size: int,
    cache: str | Path | None,
) -> _Real:
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
                "give its images for kid, pr, dc and adm"
            )
        return _Real(reference, name, "", reference.moments.count)
    real = image_set(reference, what="reference")
    found = cached_statistics(
        real, encoder, weights=kind, keep=keep, batch_size=batch_size, folder=cache
    )
    stated = False
    if isinstance(encoder, AdmFeatures) and str(reference).endswith(".npz"):
        found, stated = with_stated(found, Path(str(reference)))
    return _Real(found, real.name, real.content, real.count, stated)


def _same_resolution(fake: Statistics, real: Statistics, images: str, reference: str) -> None:
    if real.resolution is not None and fake.resolution != real.resolution:
        a, b = (" x ".join(map(str, (s.resolution or ())[::-1])) for s in (fake, real))
        raise DataError(
            f"images {images} are {a}, the reference {reference} is {b}: scores would compare sizes"
        )
