"""Methods compared by cost: what it takes to reach a score, with the spread over seeds.

Between two scored points the score is taken as linear in log(cost). A value is that of the curve
averaged over seeds; `low` and `high` are the extremes over pairs of seeds.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from erw.errors import DataError
from erw.evaluation.callback import HIGHER
from erw.study.results import Curve

LABELS = {"fd_lite2": "FD-Lite2", "fid": "FID", "sfid": "sFID", "kid": "KID"}
FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


class Reach(NamedTuple):
    """A ratio of costs at which a score is reached; None: not reached."""

    value: float | None
    low: float | None  # over pairs of seeds
    high: float | None  # None if one pair did not reach it
    at_most: bool  # the first scored point was already past the target


def cost_to_target(curve: Curve, target: float, *, metric: str) -> tuple[float, bool] | None:
    """The first cost at which a curve is at the target or better; None: never.

    The flag says that the first point was already better, so that the cost is only an upper bound.
    """
    sign = -1.0 if metric.startswith(HIGHER) else 1.0
    scores, target = [sign * value for value in curve.values], sign * target
    if scores[0] <= target:
        return curve.costs[0], scores[0] < target
    for (low, before), (high, after) in pairwise(zip(curve.costs, scores, strict=True)):
        if after <= target:
            return low * (high / low) ** ((before - target) / (before - after)), False
    return None


def mean_curve(
    curves: Sequence[Curve], of: Callable[[Sequence[float]], float] = statistics.fmean
) -> Curve:
    """The mean of curves (or `of` their values: min, max) at the steps that all of them have.

    Raises DataError if no step is common to all.
    """
    shared = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    if not shared:
        raise DataError("no step is scored in all seeds of a method: score them at the same steps")
    points = [{step: point for *point, step in zip(*curve, strict=True)} for curve in curves]
    costs, values = ([[one[step][i] for one in points] for step in shared] for i in (0, 1))
    return Curve(tuple(map(statistics.fmean, costs)), tuple(map(of, values)), tuple(shared))


def speed_up(ours: Sequence[Curve], theirs: Sequence[Curve], *, metric: str) -> Reach:
    """At what share of their whole cost our curves reach their final score."""

    def ratio(a: Curve, b: Curve) -> tuple[float, bool] | None:
        cost = cost_to_target(a, b.values[-1], metric=metric)
        return cost and (cost[0] / b.costs[-1], cost[1])

    mean = ratio(mean_curve(ours), mean_curve(theirs))
    pairs = [ratio(a, b) for a, b in product(ours, theirs)]
    values = [pair[0] for pair in pairs if pair]
    low, high = min(values, default=None), max(values) if len(values) == len(pairs) else None
    return Reach(mean and mean[0], low, high, any(one[1] for one in (mean, *pairs) if one))


def speed_ups(
    curves: Mapping[str, Sequence[Curve]], *, metric: str
) -> dict[tuple[str, str], Reach]:
    """Each method by those before it, the last by the first in front."""
    names = list(curves)
    return {
        (name, other): speed_up(curves[name], curves[other], metric=metric)
        for i, name in reversed([*enumerate(names)])
        for other in names[:i]
    }


def label_of(metric: str) -> str:
    """How a score is written: "FD-Lite2" for "fd_lite2"."""
    return LABELS.get(metric, metric.replace("_", " "))


def flops_unit(most: float) -> tuple[float, str]:
    """The SI unit in which `most` FLOPs is a number from 1 to 1000, and its size."""
    return next((unit for unit in FLOPS if most >= unit[0]), FLOPS[-1])


def amount(flops: float) -> str:
    """FLOPs with their unit: "1.94 PFLOP"."""
    scale, unit = flops_unit(flops)
    return f"{flops / scale:.3g} {unit}"
