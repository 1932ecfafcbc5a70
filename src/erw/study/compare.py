"""Methods compared at equal cost: what share of another's budget gives a method its score?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

from erw.study.results import Results, Row

NAMES = {
    "sit": "SiT",
    "repa": "REPA",
    "erw": "ERW",
    "repa_stopped": "REPA, stopped",
    "erw_paper": "ERW as published",
}
PAIRS = (("erw", "sit"), ("erw", "repa"), ("repa", "sit"))


def name_of(method: str) -> str:
    """How a method is written in text: "ERW" for "erw"; other names stay as they are."""
    return NAMES.get(method, method)


class Reach(NamedTuple):
    """The cost at which a score is reached; `bound`: the first point was already below it."""

    cost: float
    bound: bool


class Saving(NamedTuple):
    """What `method` spends to reach `against`'s final score, over what `against` spent.

    `ratio` is of the curves averaged over seeds, `low` and `high` the extremes over all pairs of
    seeds; None means not reached. `at_most`: the ratio is only an upper bound. `apart`: whether the
    final scores of all seeds lie on one side of the other's; None with a single seed on a side.
    """

    method: str
    against: str
    ratio: float | None
    low: float | None
    high: float | None
    at_most: bool
    apart: bool | None


def cost_to_target(costs: Sequence[float], scores: Sequence[float], target: float) -> Reach | None:
    """The first cost at which `scores` is at or below `target`, linear in log(cost) between points.

    `costs` rise and are positive. None if the target is never reached; if the first point is
    below it, its cost is only an upper bound and said to be one. Raises ValueError on other points.
    """
    if len(costs) != len(scores) or not costs:
        raise ValueError(f"{len(costs)} costs for {len(scores)} scores: one each, and at least one")
    if costs[0] <= 0 or any(b <= a for a, b in pairwise(costs)):
        raise ValueError("costs must be positive and rise from point to point")
    if scores[0] <= target:
        return Reach(costs[0], bound=scores[0] < target)
    for i in range(1, len(costs)):
        if scores[i] <= target:
            part = (scores[i - 1] - target) / (scores[i - 1] - scores[i])
            low, high = math.log(costs[i - 1]), math.log(costs[i])
            return Reach(math.exp(low + part * (high - low)), bound=False)
    return None


class MeanPoint(NamedTuple):
    """One evaluation point of a method over its seeds: mean position, mean score, extremes."""

    x: float
    mean: float
    low: float
    high: float


def mean_curve(results: Results, method: str, *, key: str = "flops_total") -> tuple[MeanPoint, ...]:
    """The method's score over `key` (a row key), seeds averaged point by point.

    Only points that every seed has reached are used, so that an unfinished study stays readable.
    """
    runs = [results.of(method, seed) for seed in results.seeds(method)]
    points = []
    for rows in zip(*runs, strict=False):
        scores = [row.fd_lite2 for row in rows]
        x = sum(float(getattr(row, key)) for row in rows) / len(rows)
        points.append(MeanPoint(x, sum(scores) / len(scores), min(scores), max(scores)))
    return tuple(points)


def finals(results: Results, method: str) -> tuple[float, ...]:
    """The last score of each seed."""
    return tuple(results.of(method, seed)[-1].fd_lite2 for seed in results.seeds(method))


def saving(results: Results, method: str, against: str, *, key: str = "flops_total") -> Saving:
    """How much of `against`'s cost `method` needs to reach `against`'s final score."""
    ours, theirs = mean_curve(results, method, key=key), mean_curve(results, against, key=key)
    centre = _reach([p.x for p in ours], [p.mean for p in ours], theirs[-1].mean)
    ratios: list[float | None] = []
    bound = centre is not None and centre.bound
    for a, b in product(results.seeds(method), results.seeds(against)):
        rows, last = results.of(method, a), results.of(against, b)[-1]
        reach = _reach([getattr(r, key) for r in rows], [r.fd_lite2 for r in rows], last.fd_lite2)
        ratios.append(reach.cost / getattr(last, key) if reach else None)
        bound = bound or (reach is not None and reach.bound)
    reached = [ratio for ratio in ratios if ratio is not None]
    return Saving(
        method,
        against,
        ratio=centre.cost / theirs[-1].x if centre else None,
        low=min(reached, default=None),
        high=max(reached) if len(reached) == len(ratios) else None,
        at_most=bound,
        apart=_apart(finals(results, method), finals(results, against)),
    )


def _reach(costs: Sequence[float], scores: Sequence[float], target: float) -> Reach | None:
    return cost_to_target(costs, scores, target)


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> bool | None:
    """Whether two groups of scores do not overlap; None where a group has a single member."""
    if min(len(ours), len(theirs)) < 2:
        return None
    return max(ours) < min(theirs) or max(theirs) < min(ours)


class Verdict(NamedTuple):
    """The outcome in words: a line for a title and the sentences under it."""

    title: str
    sentences: tuple[str, ...]


def verdict(results: Results, *, score: str = "FD-Lite2") -> Verdict:
    """What the data say, in words that claim no more than the seeds carry."""
    if not results.rows:
        return Verdict("Nothing was evaluated yet", ("The study has no evaluation point so far.",))
    done, waiting = finished(results)
    if waiting:
        now = f"Finished: {_names(done) or 'none'}. Still under way: {_names(waiting)}."
        if len(done) < 2:
            return Verdict("The study is under way", ("", now))
    last = {m: finals(results, m) for m in done}
    order = sorted(last, key=lambda m: sum(last[m]) / len(last[m]))
    listed = ", ".join(f"{name_of(m)} {_spread(last[m])}" for m in order)
    sentences = [f"Final {score} at equal total FLOPs (lower is better): {listed}."]
    pairs = [pair for pair in PAIRS if set(pair) <= set(last)]
    pairs += [(m, done[0]) for m in done if m not in ("sit", "repa", "erw", done[0])]
    savings = [saving(results, a, b) for a, b in pairs]
    sentences += [describe(item, score=score) for item in savings]
    title = headline(savings[0], score=score) if savings else f"{name_of(order[0])} ends first"
    if waiting:
        sentences.append(now)
    if min(len(scores) for scores in last.values()) < 2:
        sentences.append("One seed only: differences of this size can be chance.")
    return Verdict(title, tuple(sentences))


def finished(results: Results) -> tuple[list[str], list[str]]:
    """Methods whose every seed has spent its whole budget, and those that are still to come."""
    study = results.settings.get("study", {})
    planned = [method for method, _ in study.get("methods", ())]
    seeds = len(study.get("seeds", ())) or max(len(results.seeds(m)) for m in results.methods)
    names = list(dict.fromkeys([*planned, *results.methods]))

    def whole(method: str) -> bool:
        ends = [results.of(method, seed)[-1].fraction for seed in results.seeds(method)]
        return len(ends) >= seeds and all(end in (1, None) for end in ends)

    done = [name for name in names if whole(name)]
    return done, [name for name in names if name not in done]


def _names(methods: Sequence[str]) -> str:
    return ", ".join(name_of(method) for method in methods)


def headline(item: Saving, *, score: str = "FD-Lite2") -> str:
    """One line for a title."""
    ours, theirs = name_of(item.method), name_of(item.against)
    if item.ratio is None:
        return f"{ours} does not reach {theirs}’s {score} at equal cost"
    about = "at most " if item.at_most else ""
    return f"{ours} reaches {theirs}’s final {score} with {about}{item.ratio:.2f}× its compute"


def describe(item: Saving, *, score: str = "FD-Lite2") -> str:
    """A saving as a sentence, with its spread over seeds and whether the seeds overlap."""
    ours, theirs = name_of(item.method), name_of(item.against)
    overlap = ""
    if item.apart is False:
        overlap = f" The final scores of seeds overlap: {ours} and {theirs} are not told apart."
    if item.ratio is None:
        some = ""
        if item.low is not None:
            some = f" on average (the luckiest pair of seeds needs {item.low:.2f}×)"
        said = f"{ours} does not reach {theirs}’s final {score} within the same FLOPs{some}."
        if item.apart:
            said += f" Every seed of {theirs} ends better than every seed of {ours}."
        return said + overlap
    spread = ""
    if item.apart is not None:
        high = "not reached" if item.high is None else f"{item.high:.2f}"
        clear = "; final scores do not overlap" if item.apart else ""
        spread = f" ({item.low:.2f} to {high} over pairs of seeds{clear})"
    share = f"{'at most ' if item.at_most else ''}{item.ratio:.2f}× of its FLOPs{spread}"
    return f"{ours} reaches {theirs}’s final {score} with {share}.{overlap}"


def _spread(scores: Sequence[float]) -> str:
    """The mean, with the extremes where there is more than one."""
    mean = sum(scores) / len(scores)
    if len(scores) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ({min(scores):.1f} to {max(scores):.1f})"


def final_row(results: Results, method: str) -> Row:
    """The last row of the method's first seed, for what seeds share (steps, FLOPs)."""
    return results.of(method, results.seeds(method)[0])[-1]
