"""Methods compared by cost: what it takes to reach a score, with the spread over seeds.

Between two scored points the score is taken as linear in log(cost). A value is that of the curve
averaged over seeds; `low` and `high` are the extremes over seeds, or over pairs of seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

from erw.errors import DataError
from erw.evaluation.callback import HIGHER
from erw.study.results import Curve, RunResult, by_method

Methods = Mapping[str, Sequence[RunResult]]
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


class SpeedUp(NamedTuple):
    """The share of its cost after which `method` has the final score of `against`.

    `apart`: whether all final scores of one are better than all of the other; None with one seed.
    """

    method: str
    against: str
    ratio: Reach
    apart: bool | None


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
    for i in range(1, len(costs)):
        if scores[i] <= target:
            part = (scores[i - 1] - target) / (scores[i - 1] - scores[i])
            low, high = math.log(costs[i - 1]), math.log(costs[i])
            return math.exp(low + part * (high - low)), False
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
    points = [
        [(c.costs[i], c.values[i]) for c in curves for i in (c.steps.index(step),)]
        for step in shared
    ]
    costs = tuple(statistics.fmean(cost for cost, _ in point) for point in points)
    return Curve(costs, tuple(of([value for _, value in point]) for point in points), tuple(shared))


def score_curves(runs: Sequence[RunResult], metric: str, *, over: str = "flops") -> list[Curve]:
    """The curve of a score for each run. Raises DataError for a run without that score."""
    for run in runs:
        if metric not in (names := run.names("values")):
            known = f"; it has {', '.join(names)}" if names else ": train with --eval.every STEPS"
            raise DataError(f"{run.path} has no score {metric}{known}")
    return [run.curve("values", metric, over=over) for run in runs]


def reach(curves: Sequence[Curve], target: float, *, metric: str) -> Reach:
    """The cost at which the seeds of one method reach a score."""
    singles = [cost_to_target(curve, target, metric=metric) for curve in curves]
    return _spread(cost_to_target(mean_curve(curves), target, metric=metric), singles)


def speed_up(ours: Sequence[Curve], theirs: Sequence[Curve], *, metric: str) -> Reach:
    """At what share of their whole cost our curves reach their final score."""

    def ratio(a: Curve, b: Curve) -> tuple[float, bool] | None:
        cost = cost_to_target(a, b.values[-1], metric=metric)
        return cost and (cost[0] / b.costs[-1], cost[1])

    pairs = [ratio(a, b) for a, b in product(ours, theirs)]
    return _spread(ratio(mean_curve(ours), mean_curve(theirs)), pairs)


def speed_ups(
    methods: Methods, *, metric: str, over: str = "flops", both: bool = False
) -> list[SpeedUp]:
    """Each method by those before it, the last by the first in front; `both`: and back."""
    curves = {name: score_curves(runs, metric, over=over) for name, runs in methods.items()}
    names = list(methods)
    pairs = [(name, other) for name in names[::-1] for other in names[: names.index(name)]]
    speedups = []
    for name, against in pairs + ([pair[::-1] for pair in pairs] if both else []):
        ours, theirs = ([curve.values[-1] for curve in curves[key]] for key in (name, against))
        ends = max(ours) < min(theirs) or max(theirs) < min(ours)
        apart = None if min(len(ours), len(theirs)) < 2 else ends
        ratio = speed_up(curves[name], curves[against], metric=metric)
        speedups.append(SpeedUp(name, against, ratio, apart))
    return speedups


def _spread(mean: tuple[float, bool] | None, singles: Sequence[tuple[float, bool] | None]) -> Reach:
    values = [single[0] for single in singles if single]
    return Reach(
        mean[0] if mean else None,
        min(values, default=None),
        max(values) if len(values) == len(singles) else None,
        any(one[1] for one in (mean, *singles) if one),
        len(values),
        len(singles),
    )


def label_of(metric: str) -> str:
    """How a score is written: "FD-Lite2" for "fd_lite2"."""
    return LABELS.get(metric, metric.replace("_", " "))


def verdict(runs: Sequence[RunResult], metric: str) -> list[str]:
    """What the scores show: a title, then sentences that claim no more than the seeds carry."""
    groups, score = by_method(runs), label_of(metric)
    waiting = [name for name, group in groups.items() if not all(run.finished for run in group)]
    done = {name: group for name, group in groups.items() if name not in waiting}
    now = f"Still under way: {', '.join(waiting)}." if waiting else ""
    if len(done) < 2:
        return ["The study is under way", now] if waiting else [f"{next(iter(done))} is trained"]
    speedups = speed_ups(done, metric=metric)
    method, against, ratio, _ = speedups[0]
    title = f"{method} does not reach {against}’s {score} at equal cost"
    if ratio.value is not None:
        title = f"{method} reaches {against}’s final {score} with {times(ratio)} its compute"
    lines = [title, *(_sentence(item, score) for item in speedups)]
    if min(len(group) for group in done.values()) < 2:
        lines.append("One seed only: differences of this size can be chance.")
    return [*lines, now] if now else lines


def _sentence(item: SpeedUp, score: str) -> str:
    """A speed-up in words, with its spread and whether the seeds overlap."""
    ours, theirs, ratio = item.method, item.against, item.ratio
    overlap = f" The final scores of seeds overlap: {ours} and {theirs} are not told apart."
    end = overlap if item.apart is False else ""
    if ratio.value is None:
        luck = (
            f" on average (the luckiest pair of seeds needs {ratio.low:.2f}×)" if ratio.low else ""
        )
        if item.apart:
            end = f" Every seed of {theirs} ends better than every seed of {ours}."
        return f"{ours} does not reach {theirs}’s final {score} within the same FLOPs{luck}.{end}"
    spread = ""
    if item.apart is not None:
        high = "not reached" if ratio.high is None else f"{ratio.high:.2f}"
        clear = "; final scores do not overlap" if item.apart else ""
        spread = f" ({ratio.low:.2f} to {high} over pairs of seeds{clear})"
    return f"{ours} reaches {theirs}’s final {score} with {times(ratio)} of its FLOPs{spread}.{end}"


def times(ratio: Reach) -> str:
    """A ratio that is reached: "0.80×", with "at most" where it is an upper bound."""
    return f"{'at most ' if ratio.at_most else ''}{ratio.value:.2f}×"


def to_target(
    runs: Sequence[RunResult], metric: str, *, over: str, target: float | None
) -> dict[str, Any]:
    """Costs to the target and the speed-ups of all methods by each other, as JSON values."""
    groups = by_method(runs)
    curves = {name: score_curves(group, metric, over=over) for name, group in groups.items()}
    ratios = speed_ups(groups, metric=metric, over=over, both=True)
    record: dict[str, Any] = {"metric": metric, "over": over, "target": target, "reached": {}}
    if target is not None:
        for name, some in curves.items():
            record["reached"][name] = reach(some, target, metric=metric)._asdict()
    record["speed_ups"] = [item._asdict() | {"ratio": item.ratio._asdict()} for item in ratios]
    record["curves"] = {name: [c._asdict() for c in some] for name, some in curves.items()}
    return record


def summary(record: Mapping[str, Any]) -> list[str]:
    """The outcome of `to_target` in lines."""
    over, metric, target = record["over"], label_of(record["metric"]), record["target"]

    def line(head: str, result: Mapping[str, Any], text: Callable[[float], str]) -> str:
        if not result["reached"]:
            return f"  {head:<24}not reached"
        value, low, high = (
            "not reached" if result[key] is None else text(result[key])
            for key in ("value", "low", "high")
        )
        most = "at most " if result["at_most"] and result["value"] else ""
        seeds = f" ({low} to {high}; {result['reached']} of {result['tries']})"
        return f"  {head:<24}{most}{value}{seeds if result['tries'] > 1 else ' (one seed)'}"

    lines = ["score linear in log(cost) between points; brackets: extremes over seeds"]
    if target is not None:
        lines.append(f"{metric} {target:g} is reached after:")
    for name, cost in record["reached"].items():
        lines.append(line(name, cost, lambda value: amount(value, over)))
    if record["speed_ups"]:
        lines.append(f"another's final {metric} after this share of the {over} that it took there:")
    for item in record["speed_ups"]:
        head = f"{item['method']} to {item['against']}'s"
        lines.append(line(head, item["ratio"], lambda value: f"{value:.2f}x"))
    return lines


def amount(value: float, over: str) -> str:
    """A cost with its unit: "1.94 PFLOP", "1,200 steps"."""
    if over == "flops":
        scale, unit = flops_unit(value)
        return f"{value / scale:.3g} {unit}"
    return f"{value:,.1f} {over}" if over in ("epochs", "seconds") else f"{value:,.0f} {over}"


def flops_unit(most: float) -> tuple[float, str]:
    """The SI unit in which `most` FLOPs is a number from 1 to 1000, and its size."""
    for scale, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if most >= scale:
            return scale, unit
    return 1e9, "GFLOP"
