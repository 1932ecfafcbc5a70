"""Methods compared by cost: what it takes to reach a score, median and extremes over seeds.

Between two scored points the score is taken as linear in log(cost).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from erw.errors import DataError
from erw.evaluation.callback import HIGHER
from erw.study.results import Curve, RunResult

LABELS = {"fd_lite2": "FD-Lite2", "fid": "FID", "sfid": "sFID", "kid": "KID"}


class Reach(NamedTuple):
    """A cost, or share of a cost, at which a score is reached; None: not reached.

    `value`, `low` and `high` are the median and the extremes over `tries` seeds, of which `reached`
    got there. `at_most`: for one of them the first scored point was already past the target.
    """

    value: float | None
    low: float | None
    high: float | None
    at_most: bool
    reached: int
    tries: int


def cost_to_target(curve: Curve, target: float, *, metric: str) -> float | None:
    """The first cost at which a curve is at the target or better, at the earliest its first point;
    None: never. Raises ValueError for costs that are not positive or do not rise."""
    sign = -1.0 if metric.startswith(HIGHER) else 1.0
    costs, scores = curve.costs, [sign * value for value in curve.values]
    target *= sign
    if not costs or costs[0] <= 0 or any(b <= a for a, b in pairwise(costs)):
        raise ValueError(f"costs must be positive and rise from point to point: {costs}")
    if scores[0] <= target:
        return costs[0]
    for (low, before), (high, after) in pairwise(zip(costs, scores, strict=True)):
        if after <= target:
            return low * (high / low) ** ((before - target) / (before - after))
    return None


def score_curves(runs: Sequence[RunResult], metric: str, *, over: str = "flops") -> list[Curve]:
    """The curve of a score for each run. Raises DataError for a run without that score."""
    for run in runs:
        if metric not in (names := run.names("values")):
            known = f"; it has {', '.join(names)}" if names else ": train with --eval.every STEPS"
            raise DataError(f"{run.path} has no score {metric}{known}")
    return [run.curve("values", metric, over=over) for run in runs]


def reach(curves: Sequence[Curve], target: float, *, metric: str, unit: float = 1.0) -> Reach:
    """The cost, in units of `unit`, at which the seeds of one method reach a score."""
    costs = [cost_to_target(curve, target, metric=metric) for curve in curves]
    values = [math.inf if cost is None else cost / unit for cost in costs]
    value, low, high = (
        end if end < math.inf else None
        for end in (statistics.median(values), min(values), max(values))
    )
    at_most = any(cost == curve.costs[0] for cost, curve in zip(costs, curves, strict=True))
    return Reach(value, low, high, at_most, len(costs) - costs.count(None), len(costs))


def speed_up(ours: Sequence[Curve], theirs: Sequence[Curve], *, metric: str) -> Reach:
    """At what share of their whole cost our seeds reach the median of their final scores."""
    target = statistics.median(curve.values[-1] for curve in theirs)
    cost = statistics.median(curve.costs[-1] for curve in theirs)
    return reach(ours, target, metric=metric, unit=cost)


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


def amount(value: float, over: str) -> str:
    """A cost with its unit: "1.94 PFLOP", "1,200 steps"."""
    if over == "flops":
        scale, unit = flops_unit(value)
        return f"{value / scale:.3g} {unit}"
    return f"{value:,.1f} {over}" if over in ("epochs", "seconds") else f"{value:,.0f} {over}"


def flops_unit(most: float) -> tuple[float, str]:
    """The SI unit in which `most` FLOPs is a number from 1 to 1000, and its size."""
    units = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"))
    return next((unit for unit in units if most >= unit[0]), (1e9, "GFLOP"))
