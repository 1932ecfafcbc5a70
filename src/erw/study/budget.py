"""Equal cost: how many steps each method gets for the same FLOPs, and where its FLOPs go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from erw.config import Run
from erw.data.cache import Cache
from erw.errors import ConfigError
from erw.training.build import resolve, step_cost
from erw.training.ledger import Ledger, aligned_until


class Share(NamedTuple):
    """What one method gets: `points` are the steps after which it is scored, the last its end."""

    run: Run
    ledger: Ledger
    points: tuple[int, ...]


def ledger_of(run: Run, cache: Cache) -> Ledger:
    """The cost of `run` on `cache`, by step."""
    resolved = resolve(run, cache)
    cost = step_cost(resolved, cache)
    return Ledger(resolved.plan, resolved.data.batch_size, cost, len(cache))


def budget_of(steps: int, run: Run, cache: Cache) -> int:
    """FLOPs of `steps` steps of `run` (SiT: full steps and nothing else)."""
    return ledger_of(run, cache).spent(steps).total


def share(run: Run, cache: Cache, *, budget: int, fractions: Sequence[float]) -> Share:
    """`run` with as many steps as `budget` FLOPs pay for, to be scored at `fractions` of them.

    Every point is the last step whose total cost (warm-up, projector and teacher counted) is within
    its fraction of the budget: less than one step below it. Raises ConfigError if two coincide.
    """
    ledger = ledger_of(run, cache)
    points = tuple(ledger.steps_for(fraction * budget) for fraction in fractions)
    if points[0] < 1 or len(set(points)) < len(points):
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs gives {run.name} the points {points}, which are not "
            f"{len(points)} different steps; raise the budget or score at fewer points"
        )
    if points[-1] <= run.plan.warmup:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs ends {run.name} at step {points[-1]}, within its "
            f"warm-up of {run.plan.warmup} steps; raise the budget or shorten plan.warmup"
        )
    return Share(run.replace(steps=points[-1]), ledger, points)


def parts(ledger: Ledger, steps: int) -> dict[str, int]:
    """The first `steps` steps' FLOPs by part; their sum is `ledger.spent(steps).total`.

    `warmup` and `full` are the network alone, without projector and teacher.
    """
    plan, cost = ledger.plan, ledger.cost
    warm = ledger.images(min(steps, plan.warmup))
    full = ledger.images(steps) - warm
    aligned = ledger.images(min(steps, aligned_until(plan))) - warm
    return {
        "warmup": warm * cost.warmup,
        "full": full * cost.full,
        "projector": (warm + aligned) * cost.projector,
        "teacher": ledger.spent(steps).teacher,
    }


def entry(item: Share, *, budget: int) -> dict[str, Any]:
    """A method's ledger as `results.json` has it: per image, per phase and in total."""
    ledger, steps = item.ledger, item.points[-1]
    plan, cost = ledger.plan, ledger.cost
    spent, warm = ledger.spent(steps), min(steps, plan.warmup)
    aligns = bool(plan.aligns)
    return {
        "batch": {"warmup": plan.batch(0, ledger.batch_size), "full": ledger.batch_size},
        "per_image": {
            "warmup": cost.warmup if warm else 0,
            "full": cost.full,
            "projector": cost.projector if aligns else 0,
            "teacher": cost.teacher if aligns else 0,
        },
        "steps": {"warmup": warm, "full": steps - warm},
        "images": ledger.images(steps),
        "distinct_images": spent.teacher // cost.teacher if cost.teacher and aligns else 0,
        "total": parts(ledger, steps),
        "flops_total": spent.total,
        "budget": budget,
    }
