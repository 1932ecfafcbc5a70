"""Plans and the ledger: schedules in closed form, phases as data, cost as a function of the
step."""

import dataclasses
import math

import pytest

from erw import plan as plans
from erw.errors import ConfigError
from erw.models.cost import StepCost
from erw.plan import Plan
from erw.training.ledger import Ledger, aligned_until


def test_schedules_in_closed_form():
    assert plans.constant(0.5)(10**9) == 0.5
    assert (
        plans.half_life(6.0, over=50_000)(200_000) == 0.375
    )  # METHOD: 6 to 0.375 after 200K steps
    tau = 50_000 / math.log(2)
    assert plans.exponential(6.0, over=round(tau))(200_000) == pytest.approx(0.375, rel=1e-4)
    assert plans.cosine_decay(2.0, over=100)(50) == pytest.approx(1.0)
    assert plans.linear_decay(2.0, over=100)(75) == pytest.approx(0.5)
    assert [plans.stop_at(2.0, over=3)(k) for k in (2, 3)] == [2.0, 0.0]


@pytest.mark.parametrize("kind", [plans.cosine_decay, plans.linear_decay, plans.stop_at])
def test_alignment_ends_where_the_plan_says(kind):
    plan = Plan(warmup=5, align=kind(2.0, over=10))
    end = aligned_until(plan)
    assert end == 15
    assert plan(end - 1).align_weight > 0
    assert plan(end).align_weight == 0


def test_both_phases_of_a_plan():
    plan = Plan(warmup=3, depth=2, align=plans.constant(0.5), align_depth=6, warmup_lr=2.0)
    warm, full = plan(2), plan(3)
    assert (warm.name, warm.stop, warm.at, warm.flow_weight, warm.clean) == (
        "warmup",
        True,
        2,
        0,
        True,
    )
    assert (full.name, full.stop, full.at, full.flow_weight, full.clean) == (
        "full",
        False,
        6,
        1,
        False,
    )
    assert (warm.lr_scale, full.lr_scale) == (2.0, 1.0)


def test_published_presets():
    """METHOD.md 1.5."""
    p = plans.PRESETS
    assert [p[k].depth for k in ("paper_v1", "paper_v3", "code_as_released")] == [4, 5, 4]
    assert [p[k].align_depth for k in ("paper_v1", "paper_v3", "code_as_released")] == [14, 18, 14]
    assert [p[k].align.value for k in ("paper_v1", "paper_v3", "code_as_released")] == [
        4.0,
        0.5,
        6.0,
    ]
    assert p["code_as_released"].loss == "cosine" and p["paper_v3"].loss == "nt_xent"
    assert not p["sit"].aligns and p["repa"].aligns


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: plans.constant(float("nan")), "align.value is nan"),
        (lambda: plans.half_life(1.0, over=0), "needs a number of steps > 0"),
        (lambda: Plan(warmup=-1), "plan.warmup is -1; expected 0 or more"),
        (lambda: Plan(temperature=0.0), "plan.temperature is 0.0"),
        (lambda: Plan(warmup_batch=0), "plan.warmup_batch is 0"),
    ],
)
def test_impossible_values(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


COST = StepCost(warmup=20, full=100, projector=3, teacher=50)


def test_the_ledger_step_by_step():
    """Two warm-up steps of 8 images, then full ones of 4, aligned for three steps, 24 images
    cached."""
    plan = Plan(warmup=2, warmup_batch=8, align=plans.stop_at(1.0, over=3))
    ledger = Ledger(plan, 4, COST, rows=24)
    totals = [ledger.spent(step) for step in range(7)]
    warm = 8 * (20 + 3)
    full, alone = 4 * (100 + 3), 4 * 100
    teacher = [0, 8 * 50, 16 * 50, 20 * 50, 24 * 50, 24 * 50, 24 * 50]
    network = [0, warm, 2 * warm, 2 * warm + full, 2 * warm + 2 * full, 2 * warm + 3 * full]
    network.append(network[-1] + alone)
    assert [t.teacher for t in totals] == teacher
    assert [t.total for t in totals] == [n + t for n, t in zip(network, teacher, strict=True)]
    assert [t.warmup for t in totals] == [0, warm] + [2 * warm] * 5


def test_steps_for_a_budget_are_the_most_that_fit():
    for plan in (plans.SIT, plans.REPA, Plan(warmup=7, warmup_batch=2)):
        ledger = Ledger(plan, 4, COST, rows=100)
        for flops in (0, 399, 400, 12_345, 10**6):
            steps = ledger.steps_for(flops)
            assert ledger.spent(steps).total <= flops < ledger.spent(steps + 1).total


def test_sit_pays_for_no_teacher():
    ledger = Ledger(plans.SIT, 4, COST, rows=100)
    assert ledger.spent(10) == (10 * 4 * 100, 0, 0)


def test_plans_are_values():
    assert dataclasses.replace(plans.REPA, align=plans.constant(2.0)).align(0) == 2.0
    assert plans.REPA.align(0) == 0.5
