"""The registry of metrics: distances x features. A new kind of features is one entry in `SPACES`.

| distance | scores of "...-lite2"          | of                                                 |
| fd       | fd_lite2                       | Fréchet distance                                   |
| fdinf    | fdinf_lite2                    | Fréchet distance extrapolated to infinite images   |
| fdci     | fd_low_lite2, fd_high_lite2    | 95 % of it over the choice of images, by bootstrap |
| kid      | kid_lite2                      | kernel distance, cubic kernel, unbiased            |
| mmd      | mmd_lite2                      | kernel distance, Gaussian kernel, biased, x 1000   |
| pr       | precision_lite2, recall_lite2  | k-nearest-neighbour balls                          |
| dc       | density_lite2, coverage_lite2  | the same                                           |

Any distance goes with any of `SPACES`, and with any name that `erw.encoders.load_encoder` takes:
"fd-dinov2", "kid-dinov3-b". `NAMED` are published metrics that fix both: fid, sfid, is, pr, kid,
adm (the first four together) and cmmd. "fdr" is FDr^6, "fdr-lite0+lite2" the same over others.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from erw.config import nearest
from erw.errors import ConfigError, DataError
from erw.evaluation.adm import AdmFeatures, frechet_part, score_of_classes
from erw.evaluation.confidence import frechet_bootstrap, frechet_infinity
from erw.evaluation.distances import Moments, cmmd, frechet_moments, kid
from erw.evaluation.features import PooledEncoder, Statistics
from erw.evaluation.manifold import density_coverage, precision_recall


class Space(NamedTuple):
    """Features: an encoder as `load_encoder` takes it, and k of precision and recall in it."""

    encoder: str
    neighbours: int = 3


SPACES: dict[str, Space] = {
    "lite0": Space("efficientnet-lite0"),
    "lite2": Space("efficientnet-lite2"),
    "inception": Space("inception"),  # of 2015, see `erw.evaluation.inception_weights`
    # The class token of ViT-L/14 at 224 px; k = 5. As dgm-eval, which draws 10,000 images of either
    # side for precision and recall and leaves a ball's edge out: Stein et al. (arXiv 2306.04675).
    "dinov2": Space("dinov2-l@224", neighbours=5),
    "clip-embedding": Space("clip-l-336"),
    "convnextv2": Space("convnextv2-b"),
    "mae": Space("mae-l"),
    "siglip2": Space("siglip2-so400m@224"),
    "clip": Space("clip-l"),
}
INCEPTION = "inception"
FDR6 = (INCEPTION, "convnextv2", "dinov2", "mae", "siglip2", "clip")


class Pair(NamedTuple):
    """Both sides under one encoder, and k of precision and recall there."""

    real: Statistics
    fake: Statistics
    encoder: PooledEncoder
    neighbours: int = 3

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        """(real, fake), all of them."""
        assert self.real.features is not None and self.fake.features is not None
        return self.real.features, self.fake.features

    @property
    def moments(self) -> tuple[Moments, Moments]:
        """(real, fake); of the features that are kept where an encoder has more."""
        columns = getattr(self.encoder, "kept", None)
        if columns is None:
            return self.real.moments, self.fake.moments
        return self.real.moments.part(slice(columns)), self.fake.moments.part(slice(columns))


class Distance(NamedTuple):
    """How to compare: scores by name; from all features, or from moments alone."""

    compare: Callable[[Pair], Mapping[str, float]]
    needs_features: bool


def _infinity(pair: Pair) -> dict[str, float]:
    return {"fdinf": frechet_infinity(pair.features[1], pair.moments[0])}


def _interval(pair: Pair) -> dict[str, float]:
    found = frechet_bootstrap(pair.features[1], pair.moments[0])
    return {"fd_low": found.low, "fd_high": found.high}


DISTANCES: dict[str, Distance] = {
    "fd": Distance(lambda pair: {"fd": frechet_moments(*pair.moments)}, False),
    "fdinf": Distance(_infinity, True),
    "fdci": Distance(_interval, True),
    "kid": Distance(lambda pair: {"kid": kid(*pair.features).mean}, True),
    "mmd": Distance(lambda pair: {"mmd": cmmd(*pair.features)}, True),
    "pr": Distance(
        lambda pair: precision_recall(*pair.features, k=pair.neighbours)._asdict(), True
    ),
    "dc": Distance(lambda pair: density_coverage(*pair.features)._asdict(), True),
}


class Asked(NamedTuple):
    """One distance in one space; `suffix` ends the names of its scores."""

    distance: Distance
    space: str
    suffix: str = ""

    def scores(self, pair: Pair) -> dict[str, float]:
        """Scores by name."""
        found = self.distance.compare(pair)
        return {f"{name}{self.suffix}".replace("-", "_"): value for name, value in found.items()}


def _part(name: str) -> Distance:
    return Distance(lambda pair: {name: frechet_part(name, pair.real, pair.fake)}, False)


_IS = Distance(lambda pair: {"inception_score": score_of_classes(pair.fake, pair.encoder)}, True)
_CMMD = Distance(lambda pair: {"cmmd": cmmd(*pair.features)}, True)
NAMED: dict[str, tuple[Asked, ...]] = {
    "fid": (Asked(_part("fid"), INCEPTION),),
    "sfid": (Asked(_part("sfid"), INCEPTION),),
    "is": (Asked(_IS, INCEPTION),),
    "pr": (Asked(DISTANCES["pr"], INCEPTION),),
    "kid": (Asked(DISTANCES["kid"], INCEPTION),),
    "cmmd": (Asked(_CMMD, "clip-embedding"),),
}
NAMED["adm"] = NAMED["fid"] + NAMED["sfid"] + NAMED["is"] + NAMED["pr"]


class Metric(NamedTuple):
    """Everything that was asked for: distances in spaces, and tuples of spaces for FDr."""

    asked: tuple[Asked, ...]
    ratios: tuple[tuple[str, ...], ...] = ()

    @property
    def spaces(self) -> dict[str, bool]:
        """The spaces, and whether all features are needed in them."""
        found = {space: False for ratio in self.ratios for space in ratio}
        for one in self.asked:
            found[one.space] = found.get(one.space, False) or one.distance.needs_features
        return found


def metric_of(names: Sequence[str]) -> Metric:
    """What names ask for together. Raises ConfigError for an unknown one; the nearest is named."""
    if not names:
        raise ConfigError("no metric: give at least one, such as fd-lite2")
    asked: dict[tuple[int, str], Asked] = {}
    ratios: dict[tuple[str, ...], None] = {}
    for name in names:
        distance, _, space = name.partition("-")
        if distance in ("fdr", "fdr6"):
            spaces = tuple(space.split("+")) if space else FDR6
            if len(set(spaces)) != len(spaces) or "" in spaces:
                raise ConfigError(f"metric {name!r}: expected different spaces, fdr-lite0+lite2")
            ratios[spaces] = None
            continue
        if name in NAMED:
            found = NAMED[name]
        elif distance in DISTANCES and _known(space):
            found = (Asked(DISTANCES[distance], space, f"_{space}"),)
        else:
            known = [*NAMED, "fdr", *(f"{name}-{kind}" for name in DISTANCES for kind in SPACES)]
            raise ConfigError(f"unknown metric {name!r}{nearest(name, known)}")
        asked |= {(id(one.distance), one.space + one.suffix): one for one in found}
    return Metric(tuple(asked.values()), tuple(ratios))


def ratio_scores(
    spaces: Sequence[str], pairs: Mapping[str, Pair], floor: Mapping[str, Statistics]
) -> dict[str, float]:
    """FDr^k: the mean over k spaces of FD(images, reference) / FD(validation, reference).

    1 is as near to the reference as held-out real images are. Each ratio is given too.
    Source: Yang et al., Representation Fréchet Loss (arXiv 2604.28190), where k = 6 and the
    reference is ImageNet's training set. Their numbers take DINOv2 and CLIP at 256 px in timm's
    interpolation of positions, and bfloat16; ours the sides that the models were published with, in
    float32: compare with ours only.
    """
    values: dict[str, float] = {}
    for space in spaces:
        pair = pairs[space]
        distance = frechet_moments(*pair.moments)
        least = frechet_moments(*pair._replace(fake=floor[space]).moments)
        if least <= 1e-9 * pair.moments[0].cov.trace().item():
            raise DataError(
                f"validation images have distance {least:.3g} to the reference under {space}: they "
                "are the reference itself; give held-out images (--validation)"
            )
        values[f"fdr_{space}".replace("-", "_")] = distance / least
    return {f"fdr{len(spaces)}": sum(values.values()) / len(values)} | values


class Features(NamedTuple):
    """An encoder, and the file its weights are from, with its hash ("": the package's own)."""

    encoder: PooledEncoder
    file: str


def load_features(
    space: str, *, weights: str | Path | None = None, device: str = "cpu"
) -> Features:
    """The encoder of one space; `weights` are local ones, of Inception or ENTRY=PATH's.

    Raises:
        ConfigError: an unknown encoder, or `weights` for one that takes none.
        FileNotFoundError, CheckpointError: see `erw.evaluation.inception_weights.load_inception`.
    """
    if space == INCEPTION:
        from erw.evaluation.inception_weights import load_inception

        loaded = load_inception(weights, device=device)
        return Features(AdmFeatures(loaded.net), f"{loaded.file} sha256 {loaded.sha256}")
    from erw.encoders.registry import load_encoder

    name = SPACES[space].encoder if space in SPACES else space
    if weights is not None:
        entry, at, side = name.partition("@")
        name = f"{entry}={weights}{at}{side}"
    return Features(load_encoder(name, device=device), "")


def _known(space: str) -> bool:
    """Whether it is in the table, or may be an encoder: a folder, ENTRY@SIDE, MODULE:FUNCTION."""
    from erw.encoders.registry import ENCODERS

    entry = space.partition("=")[0].partition("@")[0]
    return space in SPACES or entry in ENCODERS or ":" in space or Path(space).is_dir()
