"""Scores of a set of images against a reference, with everything that they depend on.

A metric is called DISTANCE-FEATURES: "fd-lite2" is the Fréchet distance between pooled features of
EfficientNet-Lite2. It is never called FID, which is that distance under Inception of 2015: the
metrics "fid" and "adm" give it. `erw.evaluation.metrics` has the table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from erw import __version__
from erw.dist import World
from erw.errors import ConfigError
from erw.evaluation.features import CHUNK, PooledEncoder, Progress
from erw.evaluation.inputs import Images, ImageSet, image_set
from erw.evaluation.metrics import SPACES, Metric, Pair, metric_of, ratio_scores
from erw.evaluation.sides import (
    How,
    Reference,
    Side,
    Spaces,
    Weights,
    chunks_of,
    extract_all,
    reference_side,
    same_resolution,
    spaces_of,
)
from erw.evaluation.stored import Statistics, cache_folder


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found, and how.

    Attributes:
        values: score by name.
        count, reference_count: images on either side.
        images, reference: their names; the hashes tell which they were ("" where not known).
        encoder, encoder_weights: the network of the features and the hash of its weights; of
            several, separated by commas.
        encoder_file: name and SHA-256 of the file they are from; "": the package's or the hub's.
        reference_statistics: "images", or "stated": the mean and covariance in ADM's `.npz`.
        resolution: (height, width) of the images, before the encoder's own resizing.
        settings: how the images were generated, where that is known.
        features: score -> encoder, weights and file that this score is of.
        validation, validation_hash: the images that FDr is relative to; "" without.
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
    features: dict[str, dict[str, str]] = field(default_factory=dict)
    validation: str = ""
    validation_hash: str = ""
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
    weights: Weights | None = None,
    validation: Images | None = None,
    batch_size: int = 64,
    chunk: int = CHUNK,
    cache: str | Path | None = None,
    device: str = "cpu",
    world: World | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score `images` against `reference`.

    Features are kept on disk chunk by chunk: the same call goes on after a kill.

    Args:
        images: uint8 tensor (N, 3, H, W), a `Generation` or its `Samples`, a source, a cache with
            images, an iterator of uint8 batches, or the path of a folder, a zip, a cache or a
            `.npz` with `arr_0`.
        reference: the same, or `Moments` or `Statistics` made before, or their `.safetensors` file.
            With "fid" and "sfid" the mean and covariance that a `.npz` states are used, as ADM
            does.
        metric: one or several, see `erw.evaluation.metrics`.
        encoder: the network itself in place of the one that `metric` names.
        weights: file of the Inception network's weights, or space -> file or folder of weights.
        validation: held-out real images, which FDr is relative to.
        batch_size: images per forward pass.
        chunk: images between two savings.
        cache: folder for the reference's statistics; None: the user's cache folder.
        world: the processes that share the work, each of which calls this; all get the scores.
        progress: is given the number of images after each batch of this process.

    Raises:
        ConfigError: an unknown metric, FDr without validation images, impossible sizes.
        DataError: fewer than 2 images, wrong dtype or shape, another resolution than the reference.
        NumericsError: images or features that are not finite.
        FileNotFoundError, CheckpointError: weights that are missing or another network's.
    """
    asked = metric_of([metric] if isinstance(metric, str) else list(metric))
    if asked.ratios and validation is None:
        raise ConfigError("FDr is relative to held-out real images: give them (--validation)")
    if min(batch_size, chunk) < 1:
        raise ConfigError(f"batch_size {batch_size}, chunk {chunk}: expected 1 image or more")
    given = image_set(images)
    folder = Path(cache) if cache is not None else cache_folder() / "statistics"
    how = How(batch_size, chunk, folder, world or World(0, 1, torch.device("cpu")))
    spaces: Spaces = {}
    # The first process downloads what is missing before the others look for it.
    how.world.broadcast(lambda: spaces.update(spaces_of(asked, encoder, weights, device=device)))
    spaces = spaces or spaces_of(asked, encoder, weights, device=device)
    real = reference_side(reference, spaces, how, against=given)
    floor = None
    if validation is not None and asked.ratios:
        needed = {space: spaces[space] for ratio in asked.ratios for space in ratio}
        floor = reference_side(validation, needed, how, against=given, what="validation set")
    chunks = chunks_of(given, how)
    found = extract_all(given, spaces, how, chunks=chunks, progress=progress)
    scores = how.world.broadcast(lambda: _scores(asked, spaces, given, found, real, floor))
    if chunks and how.world.first:
        chunks.drop()
    return scores


def _scores(
    asked: Metric,
    spaces: Spaces,
    given: ImageSet,
    found: Mapping[str, Statistics],
    real: Side,
    floor: Side | None,
) -> Scores:
    """All scores from all statistics, in the first process."""
    pairs = {}
    for space, used in spaces.items():
        k = SPACES[space].neighbours if space in SPACES else Pair._field_defaults["neighbours"]
        pairs[space] = pair = Pair(real.statistics[space], found[space], used.encoder, k)
        a, b = pair.fake.resolution, pair.real.resolution
        same_resolution(a, b, given.name, f"the reference {real.name}")
        if floor is not None and space in floor.statistics:
            b = floor.statistics[space].resolution
            same_resolution(a, b, given.name, f"the validation set {floor.name}")
    values: dict[str, float] = {}
    features: dict[str, dict[str, str]] = {}
    for part in asked.asked:
        new = part.scores(pairs[part.space])
        values |= new
        features |= {name: spaces[part.space].stated for name in new}
    for ratio in asked.ratios:
        assert floor is not None
        mean, *each = ratio_scores(ratio, pairs, floor.statistics).items()
        values |= dict([mean, *each])
        features |= {name: spaces[s].stated for (name, _), s in zip(each, ratio, strict=True)}
    one, used_all = next(iter(found.values())), list(spaces.values())
    assert one.resolution is not None
    return Scores(
        values=values,
        count=one.moments.count,
        reference_count=real.images,
        images=given.name,
        images_hash=given.content,
        reference=real.name,
        reference_hash=real.content,
        encoder=", ".join(used.encoder.name for used in used_all),
        encoder_weights=", ".join(used.weights for used in used_all),
        resolution=one.resolution,
        settings=given.settings,
        encoder_file=", ".join(used.file for used in used_all if used.file),
        reference_statistics="stated" if real.stated else "images",
        features=features,
        validation=floor.name if floor else "",
        validation_hash=floor.content if floor else "",
    )
