"""The two sides of an evaluation, and the spaces that both are brought to."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from erw.dist import World
from erw.errors import ConfigError, DataError
from erw.evaluation.adm import AdmFeatures, with_stated
from erw.evaluation.distances import Moments
from erw.evaluation.features import PooledEncoder, Progress, Wanted, extract
from erw.evaluation.inputs import Images, ImageSet, image_set
from erw.evaluation.metrics import INCEPTION, Metric, load_features
from erw.evaluation.stored import Chunks, Statistics, load_statistics, save_statistics
from erw.io import hash_tensors

Reference = Images | Moments | Statistics
Weights = str | Path | Mapping[str, str | Path]


class Used(NamedTuple):
    """One space: its network, the hash and file of its weights, whether all features are kept."""

    encoder: PooledEncoder
    weights: str
    file: str
    keep: bool

    @property
    def wanted(self) -> Wanted:
        """What to make, under a name on disk that says which weights."""
        key = f"{self.encoder.name.replace('/', '_')}-{self.weights}"
        return Wanted(self.encoder, self.keep, key)

    @property
    def stated(self) -> dict[str, str]:
        """As a result says it."""
        return {"encoder": self.encoder.name, "weights": self.weights, "file": self.file}


Spaces = dict[str, Used]


class How(NamedTuple):
    """How features are made, and where they are kept."""

    batch_size: int
    chunk: int
    folder: Path
    world: World


class Side(NamedTuple):
    """Statistics by space (none but in the first process), and what they are of.

    `stated`: whether the file's own mean and covariance stand in for those of its images.
    """

    statistics: dict[str, Statistics]
    name: str
    content: str
    images: int
    stated: bool = False


def spaces_of(
    metric: Metric,
    encoder: PooledEncoder | None = None,
    weights: Weights | None = None,
    *,
    device: str = "cpu",
) -> Spaces:
    """The networks that a metric needs; `encoder` in place of the only one.

    Raises ConfigError for weights that nothing asks for, or one `encoder` for several spaces.
    """
    needed = metric.spaces
    given = dict(weights) if isinstance(weights, Mapping) else {INCEPTION: weights}
    for space, path in given.items():
        if path is not None and space not in needed:
            raise ConfigError(
                f"weights {path} of {space} are without effect on features of "
                f"{', '.join(needed)}; leave them out, or ask for a metric of {space}"
            )
    if encoder is not None and len(needed) > 1:
        raise ConfigError(f"metrics of {', '.join(needed)} mix features: one encoder was given")
    found: Spaces = {}
    for space, keep in needed.items():
        net, file = encoder, ""
        if net is None:
            net, file = load_features(space, weights=given.get(space), device=device)
        hashed = hash_tensors(net) if isinstance(net, nn.Module) else net.name
        found[space] = Used(net, hashed, file, keep)
    return found


def chunks_of(images: ImageSet, how: How) -> Chunks | None:
    """Where chunks of these are kept: for more than one, or for several processes."""
    if not images.content or images.count is None:
        return None
    if how.world.size == 1 and images.count <= how.chunk:
        return None
    return Chunks(how.folder / "chunks" / f"{images.content}-{images.count}-{how.chunk}")


def extract_all(
    images: ImageSet,
    spaces: Spaces,
    how: How,
    *,
    chunks: Chunks | None,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Statistics by space, in the first process."""
    found = extract(
        images,
        [used.wanted for used in spaces.values()],
        chunks=chunks,
        chunk=how.chunk,
        batch_size=how.batch_size,
        world=how.world,
        progress=progress,
    )
    return dict(zip(spaces, found, strict=True)) if found else {}


def reference_side(
    reference: Reference, spaces: Spaces, how: How, *, against: ImageSet, what: str = "reference"
) -> Side:
    """Statistics of the reference: given, kept from another time, or made and kept.

    Raises DataError where it has another resolution than the images `against` it, or too little.
    """
    name = "statistics"
    if isinstance(reference, str | Path) and Path(reference).suffix == ".safetensors":
        name, reference = Path(reference).name, load_statistics(reference)
    if isinstance(reference, Moments):
        reference = Statistics(reference)
    if isinstance(reference, Statistics):
        return _given(reference, name, spaces)
    real = image_set(reference, what=what)
    same_resolution(against.resolution, real.resolution, against.name, f"the {what} {real.name}")
    found = _made(real, spaces, how)
    count, stated = real.count or 0, False
    for space, used in spaces.items():
        if space not in found:  # not the first process
            continue
        count = found[space].moments.count
        if isinstance(used.encoder, AdmFeatures) and str(reference).endswith(".npz"):
            found[space], stated = with_stated(found[space], Path(str(reference)))
    return Side(found, real.name, real.content, count, stated)


def same_resolution(
    images: tuple[int, int] | None, reference: tuple[int, int] | None, name: str, other: str
) -> None:
    """Raises DataError where both (height, width) are known, and differ."""
    if images is not None and reference is not None and images != reference:
        a, b = (f"{width} x {height}" for height, width in (images, reference))
        raise DataError(
            f"images {name} are {a}, {other} is {b}: scores would compare sizes; bring both to "
            "one size first"
        )


def _given(reference: Statistics, name: str, spaces: Spaces) -> Side:
    if len(spaces) > 1:
        raise DataError(
            f"the reference {name} is of one kind of features, {', '.join(spaces)} are asked for: "
            "give its images"
        )
    space, used = next(iter(spaces.items()))
    if used.keep and reference.features is None:
        raise DataError(
            f"the reference {name} holds moments alone, enough for fd; "
            "give its images for kid, mmd, pr, dc and adm"
        )
    return Side({space: reference}, name, "", reference.moments.count)


def _made(real: ImageSet, spaces: Spaces, how: How) -> dict[str, Statistics]:
    """Statistics of a reference in all spaces, in the first process."""
    found: dict[str, Statistics] = {}
    first = how.world.first

    def look() -> list[str]:
        """Load what there is; the spaces that are missing."""
        for space, used in spaces.items() if real.content else ():
            kept = _load(_path(real, used, how))
            if kept is not None and (kept.features is not None or not used.keep):
                found[space] = kept
        return [space for space in spaces if space not in found]

    missing = how.world.broadcast(look)
    if missing:
        chunks = chunks_of(real, how)
        wanted = {space: spaces[space] for space in missing}
        made = extract_all(real, wanted, how, chunks=chunks)
        for space, statistics in made.items():
            if real.content:
                _save(_path(real, spaces[space], how), statistics)
        if chunks and first:
            chunks.drop()
        found |= made
    return found


def _path(real: ImageSet, used: Used, how: How) -> Path:
    return how.folder / f"{real.content}-{real.count}-{used.wanted.key}.safetensors"


def _load(path: Path) -> Statistics | None:
    """What is kept; a file that cannot be read is made again."""
    try:
        return load_statistics(path)
    except (FileNotFoundError, DataError):
        return None


def _save(path: Path, made: Statistics) -> None:
    """Keep it; where that is impossible, only time is lost."""
    try:
        save_statistics(path, made)
    except OSError:
        return
