"""Methods compared by cost: what it takes to reach a score, with the spread over seeds.

Between two scored points the score is taken as linear in log(cost). A value is that of the curve
averaged over seeds; `low` and `high` are the extremes over seeds, or over pairs of seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from erw.errors import DataError
from erw.evaluation.callback import HIGHER
from erw.study.results import Curve, RunResult

LABELS = {"fd_lite2": "FD-Lite2", "fid": "FID", "sfid": "sFID", "kid": "KID"}


class Reach(NamedTuple):
    """A cost at which a score is reached, or a ratio of costs; None: not reached.

    `low` and `high` are extremes over `tries` seeds (or pairs), of which `reached` got there; high
    is None if one did not. `at_most`: the first scored point was already past the target.
    """

    value: float | None
    low: float | None
    high: float | None
    at_most: bool
    reached: int
    tries: int


def cost_to_target(curve: Curve, target: float, *, metric: str) -> tuple[float, bool] | None:
    """The first cost at which a curve is at the target or better; None: never.

    The flag says that the first point was already better, so that the cost is only an upper bound.
    Raises ValueError for costs that are not positive or do not rise.
    """
    sign = -1.0 if metric.startswith(HIGHER) else 1.0
    costs, scores = curve.costs, [sign * value for value in curve.values]
    target *= sign
    if not costs or costs[0] <= 0 or any(b <= a for a, b in pairwise(costs)):
        raise ValueError(f"costs must be positive and rise from point to point: {costs}")
    if scores[0] <= target:
        return costs[0], scores[0] < target
    for (low, before), (high, after) in pairwise(zip(costs, scores, strict=True)):
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
    rows = [[(c.costs[i], c.values[i]) for c in curves for i in (c.steps.index(step),)]
            for step in shared]  # fmt: skip
    costs, values = zip(*(zip(*row, strict=True) for row in rows), strict=True)
    return Curve(tuple(map(statistics.fmean, costs)), tuple(map(of, values)), tuple(shared))


def score_curves(runs: Sequence[RunResult], metric: str, *, over: str = "flops") -> list[Curve]:
    """The curve of a score for each run. Raises DataError for a run without that score."""
    for run in runs:
        if metric not in (names := run.names("values")):
            known = f"; it has {', '.join(names)}" if names else ": train with --eval.every STEPS"
            raise DataError(f"{run.path} has no score {metric}{known}")
    return [run.curve("values", metric, over=over) for run in runs]


def speed_up(ours: Sequence[Curve], theirs: Sequence[Curve], *, metric: str) -> Reach:
    """At what share of their whole cost our curves reach their final score."""

    def ratio(a: Curve, b: Curve) -> tuple[float, bool] | None:
        cost = cost_to_target(a, b.values[-1], metric=metric)
        return cost and (cost[0] / b.costs[-1], cost[1])

    pairs = [ratio(a, b) for a, b in product(ours, theirs)]
    return _spread(ratio(mean_curve(ours), mean_curve(theirs)), pairs)


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


def _spread(mean: tuple[float, bool] | None, singles: Sequence[tuple[float, bool] | None]) -> Reach:
    values = [single[0] for single in singles if single]
    low, high = min(values, default=None), max(values) if len(values) == len(singles) else None
    at_most = any(one[1] for one in (mean, *singles) if one)
    return Reach(mean and mean[0], low, high, at_most, len(values), len(singles))


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
