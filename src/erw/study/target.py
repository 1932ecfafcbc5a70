"""What it costs to reach a score, and how much faster one method reaches another's; with spread.

| symbol        | meaning                                                                        |
| track         | one run's scores: a seed of a method                                           |
| cost          | of training until a score, warm-up and teacher counted, over one of `COSTS`    |

Between two points the score is taken as linear in log(cost). The value is that of the mean curve
over seeds; the interval is of the same under a bootstrap over seeds (all resamples where they are
few), so that it speaks of training again with other seeds, not of drawing other samples. A target
that is not reached is an answer: None, and infinitely far in the bootstrap.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

from erw.errors import DataError
from erw.evaluation.callback import HIGHER
from erw.study.compare import cost_to_target, name_of
from erw.study.marks import flops_unit

COSTS = ("flops", "epochs", "images", "steps", "seconds")
CONFIDENCE = 0.95
RESAMPLES = 4096
HOW = "score linear in log(cost) between points; mean curve over seeds"


class Track(NamedTuple):
    """One run's scores: after which steps, at what cost."""

    method: str
    seed: int
    steps: tuple[int, ...]
    costs: tuple[float, ...]
    scores: tuple[float, ...]


class Reached(NamedTuple):
    """The cost at which a method reaches a target; None: not reached.

    `low` and `high` bound it (None: not reached there), where `seeds` is more than 1. `bound`: the
    first point was already past the target. `reached_by` counts seeds, `spent` and `final` are of
    the end of the mean curve, `best` is its best score.
    """

    method: str
    cost: float | None
    low: float | None
    high: float | None
    bound: bool
    seeds: int
    reached_by: int
    spent: float
    final: float
    best: float


class SpeedUp(NamedTuple):
    """Cost at which `method` reaches the final score of `against`, over what `against` spent."""

    method: str
    against: str
    ratio: float | None
    low: float | None
    high: float | None
    bound: bool
    seeds: tuple[int, int]


class Mean(NamedTuple):
    """The mean of some tracks at the steps that all of them have."""

    costs: list[float]
    scores: list[float]


def mean_of(tracks: Sequence[Track]) -> Mean:
    """Costs and scores averaged over tracks. Raises DataError if no step is common to all."""
    shared = sorted(set.intersection(*(set(track.steps) for track in tracks)))
    if not shared:
        names = ", ".join(f"{track.method}/{track.seed}" for track in tracks)
        raise DataError(f"no step is scored in all of {names}: score them at the same steps")
    at = [[track.steps.index(step) for step in shared] for track in tracks]
    columns = [
        [
            sum(getattr(track, name)[place[i]] for track, place in zip(tracks, at, strict=True))
            / len(tracks)
            for i in range(len(shared))
        ]
        for name in ("costs", "scores")
    ]
    return Mean(*columns)


def reached(tracks: Sequence[Track], target: float, *, metric: str) -> Reached:
    """The cost at which one method's tracks reach a score."""
    sign = -1 if metric.startswith(HIGHER) else 1

    def cost(chosen: Sequence[Track]) -> float:
        mean = mean_of(chosen)
        found = cost_to_target(mean.costs, [sign * s for s in mean.scores], sign * target)
        return found.cost if found else math.inf

    mean = mean_of(tracks)
    first = sign * (mean.scores[0] - target) < 0
    value, (low, high) = cost(tracks), _interval([tracks], lambda chosen: cost(chosen[0]))
    by = sum(math.isfinite(cost([track])) for track in tracks)
    best = min(mean.scores, key=lambda score: sign * score)
    end = (mean.costs[-1], mean.scores[-1], best)
    name = tracks[0].method
    return Reached(name, _finite(value), low, high, first, len(tracks), by, *end)


def speed_up(ours: Sequence[Track], theirs: Sequence[Track], *, metric: str) -> SpeedUp:
    """At what share of their whole cost our tracks reach their final score."""
    sign = -1 if metric.startswith(HIGHER) else 1

    def ratio(chosen: Sequence[Sequence[Track]]) -> float:
        a, b = mean_of(chosen[0]), mean_of(chosen[1])
        found = cost_to_target(a.costs, [sign * s for s in a.scores], sign * b.scores[-1])
        return found.cost / b.costs[-1] if found else math.inf

    value, (low, high) = ratio([ours, theirs]), _interval([ours, theirs], ratio)
    first = sign * (mean_of(ours).scores[0] - mean_of(theirs).scores[-1]) < 0
    names, counts = (ours[0].method, theirs[0].method), (len(ours), len(theirs))
    return SpeedUp(*names, _finite(value), low, high, first, counts)


def compared(tracks: Sequence[Track], *, metric: str, over: str, target: float | None) -> dict:
    """Everything as JSON values: costs to the target, speed-ups of all pairs, and the tracks."""
    groups: dict[str, list[Track]] = {}
    for track in tracks:
        groups.setdefault(track.method, []).append(track)
    pairs = permutations(groups.values(), 2)
    costs = [] if target is None else [reached(g, target, metric=metric) for g in groups.values()]
    return {
        "metric": metric,
        "over": over,
        "target": target,
        "how": HOW,
        "interval": f"{CONFIDENCE:.0%} bootstrap over seeds",
        "reached": [found._asdict() for found in costs],
        "speed_ups": [speed_up(a, b, metric=metric)._asdict() for a, b in pairs],
        "tracks": [track._asdict() for track in tracks],
    }


def _interval(
    groups: Sequence[Sequence[Track]], value: Callable[[Sequence[Sequence[Track]]], float]
) -> tuple[float | None, float | None]:
    """Bounds of a value when the seeds of every group are drawn again; Nones with one seed."""
    if max(len(group) for group in groups) < 2:
        return None, None
    if math.prod(len(group) ** len(group) for group in groups) <= RESAMPLES:
        every = product(*(product(group, repeat=len(group)) for group in groups))
        values = sorted(value(chosen) for chosen in every)
    else:
        rng = random.Random(0)
        some = ([rng.choices(group, k=len(group)) for group in groups] for _ in range(RESAMPLES))
        values = sorted(value(chosen) for chosen in some)
    tail = (1 - CONFIDENCE) / 2
    low = values[math.floor(tail * (len(values) - 1))]
    high = values[math.ceil((1 - tail) * (len(values) - 1))]
    return _finite(low), _finite(high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def told(record: Mapping[str, Any]) -> list[str]:
    """The outcome in lines."""
    over, metric, target = record["over"], record["metric"], record["target"]
    lines = [f"{record['how']}; brackets: {record['interval']}"]
    if target is not None:
        sense = "at or above" if metric.startswith(HIGHER) else "at or below"
        named = f", E@{metric}-{target:g}" if over == "epochs" else ""
        lines.append(f"{metric} {sense} {target:g}, over {over}{named}:")
    for r in [Reached(**found) for found in record["reached"]]:
        head = f"  {name_of(r.method):<24}"
        if r.cost is None:
            lines.append(f"{head}not reached in {amount(r.spent, over)}; best {r.best:.4g}")
        else:
            most = "at most " if r.bound else ""
            lines.append(f"{head}{most}{amount(r.cost, over)}{_spread(r, over)}")
    if record["speed_ups"]:
        lines.append(f"another's final {metric}, at this share of the {over} that it took there:")
    for s in [SpeedUp(**found) for found in record["speed_ups"]]:
        head = f"  {name_of(s.method)} to {name_of(s.against)}'s"
        if s.ratio is None:
            some = f" (seeds may: from {s.low:.2f}x)" if s.low is not None else ""
            lines.append(f"{head:<26}not reached{some}")
        else:
            most, high = "at most " if s.bound else "", "not reached"
            high = high if s.high is None else f"{s.high:.2f}"
            spread = f" ({s.low:.2f} to {high})" if s.low is not None else " (one seed)"
            lines.append(f"{head:<26}{most}{s.ratio:.2f}x{spread}")
    return lines


def _spread(r: Reached, over: str) -> str:
    if r.seeds < 2:
        return " (one seed: no spread)"
    high = "not reached" if r.high is None else amount(r.high, over)
    low = "not reached" if r.low is None else amount(r.low, over)
    return f" ({low} to {high}; {r.reached_by} of {r.seeds} seeds)"


def amount(value: float, over: str) -> str:
    """A cost with its unit."""
    if over == "flops":
        scale, unit = flops_unit(value)
        return f"{value / scale:.3g} {unit}"
    return f"{value:,.1f} {over}" if over in ("epochs", "seconds") else f"{value:,.0f} {over}"
