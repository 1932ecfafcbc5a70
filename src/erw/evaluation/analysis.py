"""What a transformer knows at which depth, at which noise, after how many steps.

| metric     | of                                                                             |
| cknna      | tokens' mean against an encoder's, nearest-neighbour alignment (REPA, Fig. 2)  |
| cka        | the same, linear centred kernel alignment                                      |
| mutual_knn | the same, share of nearest neighbours in common                                |
| probe      | classes, by a linear map from the tokens' mean                                 |
| knn        | classes, by the nearest neighbours                                             |
| spatial    | tokens alone: similarity of neighbours less that of distant ones (LDS, iREPA)  |

Means are scaled to length 1 before cknna, cka and mutual_knn, as Huh et al. do: otherwise a few
long vectors decide who is near. Labels are withheld from the network unless asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from erw.config import nearest
from erw.data.cache import Cache
from erw.encoders.base import Encoder
from erw.errors import ConfigError
from erw.evaluation import alignment
from erw.evaluation.hidden import Labels, States, hidden_states
from erw.evaluation.material import Material, material
from erw.evaluation.probes import knn_accuracy, linear_probe


class Point(NamedTuple):
    """One value of a curve: of which run, after how many steps, at what noise, after which block.

    With depth 0: the encoder's own features, as a reference for probe and knn.
    """

    run: str
    step: int
    time: float
    depth: int
    value: float


class Change(NamedTuple):
    """How a value went over training steps: first, lowest and last, and the lowest one's step.

    `u_shaped`: the lowest lies strictly between, and what was lost since the first step comes back
    by a tenth at least.
    """

    first: float
    lowest: float
    last: float
    step: int
    u_shaped: bool


def over_steps(steps: Sequence[float], values: Sequence[float]) -> Change | None:
    """How a value went over rising steps; None for fewer than 3."""
    if len(steps) < 3:
        return None
    place = min(range(len(values)), key=values.__getitem__)
    first, low, last = values[0], values[place], values[-1]
    between = 0 < place < len(values) - 1
    return Change(
        first, low, last, int(steps[place]), between and last - low >= 0.1 * (first - low)
    )


class Rule(NamedTuple):
    """How cknna, cka and mutual_knn compare: neighbours, and which estimate of HSIC."""

    k: int = 10
    unbiased: bool = True


Measure = Callable[[States, int, Material, Rule], float]


def _against(how: Callable[[Tensor, Tensor, Rule], float]) -> Measure:
    def value(states: States, depth: int, shown: Material, rule: Rule) -> float:
        a, b = (F.normalize(x.double(), dim=-1) for x in (states.pooled[depth], shown.target))
        return how(a, b, rule)

    return value


def _classes(how: Callable[[Tensor, Tensor], float]) -> Measure:
    return lambda states, depth, shown, rule: how(states.pooled[depth], shown.labels)


METRICS: dict[str, Measure] = {
    "cknna": _against(lambda a, b, rule: alignment.cknna(a, b, **rule._asdict())),
    "cka": _against(lambda a, b, rule: alignment.cka(a, b, unbiased=rule.unbiased)),
    "mutual_knn": _against(lambda a, b, rule: alignment.mutual_knn(a, b, k=rule.k)),
    "probe": _classes(linear_probe),
    "knn": _classes(knn_accuracy),
    "spatial": lambda states, depth, shown, rule: states.spatial[depth],
}


def curve(
    model: Any,
    shown: Material,
    *,
    metric: str = "cknna",
    times: Sequence[float] = (0.0,),
    depths: Sequence[int] = (),
    k: int = 10,
    unbiased: bool = True,
    labels: Labels = "null",
    batch_size: int = 64,
    name: str = "",
) -> Iterator[Point]:
    """A metric over depth and noise time, time by time.

    Args:
        model, depths, labels: see `erw.evaluation.hidden.hidden_states`.
        shown: the images, from `erw.evaluation.material`.
        k: neighbours, for cknna and mutual_knn.
        unbiased: the estimate of HSIC, for cknna and cka.
        name: of the run, in the points.

    Raises:
        ConfigError: an unknown metric, an impossible time or depth.
        DataError: too few images for k, or one class where classes are asked for.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}{nearest(metric, METRICS)}")
    for time in times:
        states = hidden_states(
            model, shown, time=time, depths=depths, labels=labels, batch_size=batch_size
        )
        for depth in states.pooled:
            value = METRICS[metric](states, depth, shown, Rule(k, unbiased))
            yield Point(name, int(getattr(model, "step", 0)), time, depth, value)


def reference(shown: Material, *, metric: str) -> float | None:
    """What the encoder's own features reach, for probe, knn and spatial; None for the others."""
    if metric == "spatial":
        return shown.spatial
    how = {"probe": linear_probe, "knn": knn_accuracy}.get(metric)
    return how(shown.target, shown.labels) if how else None


def cknna(
    model: Any,
    *,
    data: Cache | str | Path,
    encoder: str | Encoder | None = None,
    time: float = 0.0,
    depths: Sequence[int] = (),
    count: int = 2000,
    k: int = 10,
    unbiased: bool = True,
) -> dict[int, float]:
    """CKNNA of a model's blocks with an encoder: depth, counted from 1 -> value.

    `erw.evaluation.cknna` compares two sets of features directly.

    Args:
        model: a run from `erw.load`, or any network with SiT's taps.
        data: a cache with the encoder's features, or with images.
        encoder: a name or an encoder; None: the first in the cache.
        time: noise time, 0 (clean) to 1 (noise alone).
        count: images; REPA has 10,000.

    Raises:
        CacheError, ConfigError, DataError: see `material` and `curve`.
    """
    shown = material(data, encoder=encoder, count=count)
    options: dict[str, Any] = {"times": (time,), "depths": depths, "k": k, "unbiased": unbiased}
    return {p.depth: p.value for p in curve(model, shown, **options)}
