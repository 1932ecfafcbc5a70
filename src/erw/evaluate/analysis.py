"""What a transformer knows at which depth, at which noise, after how many steps.

| metric     | of                                                                             |
| cknna      | tokens' mean against an encoder's, nearest-neighbour alignment (REPA, Fig. 2)  |
| cka        | the same, linear centred kernel alignment                                      |
| mutual_knn | the same, share of nearest neighbours in common                                |
| probe      | classes, by a linear map from the tokens' mean                                 |
| knn        | classes, by the nearest neighbours                                             |
| spatial    | tokens alone: similarity of neighbours less that of distant ones (iREPA)       |

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
from erw.evaluate import alignment
from erw.evaluate.hidden import Labels, Material, States, checkpoints, hidden_states, material
from erw.evaluate.probes import knn_accuracy, linear_probe
from erw.train.load import Trained


class Point(NamedTuple):
    """One value of a curve: of which run, after how many steps, at what noise, after which block.

    With depth 0: the encoder's own features, as a reference for probe and knn.
    """

    run: str
    step: int
    time: float
    depth: int
    value: float


Measure = Callable[[States, int, Material, int], float]


def _against(how: Callable[..., float]) -> Measure:
    def value(states: States, depth: int, shown: Material, k: int) -> float:
        a, b = (F.normalize(x.double(), dim=-1) for x in (states.pooled[depth], shown.target))
        return how(a, b) if how is alignment.cka else how(a, b, k=k)

    return value


def _classes(how: Callable[[Tensor, Tensor], float]) -> Measure:
    return lambda states, depth, shown, k: how(states.pooled[depth], shown.labels)


METRICS: dict[str, Measure] = {
    "cknna": _against(alignment.cknna),
    "cka": _against(alignment.cka),
    "mutual_knn": _against(alignment.mutual_knn),
    "probe": _classes(linear_probe),
    "knn": _classes(knn_accuracy),
    "spatial": lambda states, depth, shown, k: states.spatial[depth],
}


def curve(
    model: Any,
    shown: Material,
    *,
    metric: str = "cknna",
    times: Sequence[float] = (0.0,),
    depths: Sequence[int] = (),
    k: int = 10,
    labels: Labels = "null",
    batch_size: int = 64,
    name: str = "",
) -> Iterator[Point]:
    """A metric over depth and noise time, time by time.

    Args:
        model, depths, labels: see `erw.evaluate.hidden.hidden_states`.
        shown: the images, from `erw.evaluate.hidden.material`.
        k: neighbours, for cknna and mutual_knn.
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
            value = METRICS[metric](states, depth, shown, k)
            yield Point(name, int(getattr(model, "step", 0)), time, depth, value)


def curve_over_steps(
    model: Trained, folder: str | Path, shown: Material, **options: Any
) -> Iterator[Point]:
    """`curve` of every checkpoint that a run folder keeps, oldest first."""
    for _, at in checkpoints(model, folder):
        yield from curve(at, shown, **options)


def reference(shown: Material, *, metric: str) -> float | None:
    """What the encoder's own features reach, for probe and knn; None for other metrics."""
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
) -> dict[int, float]:
    """CKNNA of a model's blocks with an encoder: depth, counted from 1 -> value.

    `erw.evaluate.cknna` compares two sets of features directly.

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
    return {p.depth: p.value for p in curve(model, shown, times=(time,), depths=depths, k=k)}
