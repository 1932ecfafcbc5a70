"""Plans: schedules in closed form, phases as data, terms and what each loss weighs."""

import dataclasses
import math
from collections.abc import Callable

import pytest

from erw import plan as plans
from erw.align import ALIGN_LOSSES, PROJECTORS, TARGET_NORMS
from erw.config import Run, from_dict, to_dict
from erw.errors import ConfigError
from erw.plan import SCHEDULES, Align, Plan, Schedule


def test_schedules_in_closed_form() -> None:
    assert plans.constant(0.5)(10**9) == 0.5
    assert plans.half_life(6.0, over=50_000)(200_000) == 0.375  # METHOD: 6 to 0.375 after 200K
    tau = 50_000 / math.log(2)
    assert plans.exponential(6.0, over=round(tau))(200_000) == pytest.approx(0.375, rel=1e-4)
    assert plans.cosine_decay(2.0, over=100)(50) == pytest.approx(1.0)
    assert plans.linear_decay(2.0, over=100)(75) == pytest.approx(0.5)
    assert [plans.stop_at(2.0, over=3)(k) for k in (2, 3)] == [2.0, 0.0]


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (plans.constant(0.5), None),
        (plans.constant(0.0), 0),
        (plans.linear_decay(2.0, over=10), 10),
        (plans.cosine_decay(2.0, over=10), 10),
        (plans.stop_at(2.0, over=10), 10),
        (plans.half_life(6.0, over=100), 997),  # 2^-9.966 = 1e-3, the floor
        (Schedule("half_life", 6.0, 100, floor=2.0**-3), 301),
        (plans.exponential(1.0, over=1000), 6908),  # 1000 ln 1000
    ],
)
def test_a_schedule_says_itself_when_it_ends(schedule: Schedule, end: int | None) -> None:
    assert schedule.ends == end
    if end:
        assert schedule(end - 1) > 0 == schedule(end)
    plan = Plan(warmup=5, align=schedule)
    starts = {start for start, _ in plan.segments(20_000)}
    assert starts == ({0, 5} if end is None else {0, 5, 5 + end})


def test_a_schedule_from_outside() -> None:
    SCHEDULES["halves"] = lambda u: max(0.0, 1 - u // 1 / 2)
    try:
        schedule = Schedule("halves", 4.0, 10)
        assert [schedule(k) for k in (0, 9, 10, 20)] == [4.0, 4.0, 2.0, 0.0]
        assert schedule.ends == 20
    finally:
        del SCHEDULES["halves"]


def test_both_phases_of_a_plan() -> None:
    plan = Plan(warmup=3, depth=2, align=(Align(block=6),), warmup_lr=2.0)
    warm, full = plan(2), plan(3)
    assert (warm.name, warm.stop_at, warm.taps, warm.clean) == ("warmup", 2, (2,), True)
    assert (full.name, full.stop_at, full.taps, full.clean) == ("full", None, (6,), False)
    assert (warm.weights, full.weights) == ({"align": 1.0}, {"flow": 1.0, "align": 0.5})
    assert (warm.lr_scale, full.lr_scale) == (2.0, 1.0)


def test_terms_come_and_go_by_their_phase_and_schedule() -> None:
    plan = Plan(
        warmup=2,
        depth=2,
        align=(
            Align(name="early", phase="warmup", target="encoder:dinov2-b"),
            Align(name="late", block=3, phase="full", weight=plans.stop_at(1.0, over=3)),
            Align(name="sync", block=2, target="block", target_block=4, projector="none",
                  weight=plans.constant(0.2), phase="full"),
        ),
    )  # fmt: skip
    named = [sorted(plan(step).weights) for step in (0, 2, 5)]
    assert named == [["early"], ["flow", "late", "sync"], ["flow", "sync"]]
    assert [plan(step).taps for step in (0, 2, 5)] == [(2,), (2, 3, 4), (2, 4)]
    assert [plan(step).reads_encoder for step in (0, 2, 5)] == [True, True, False]


def test_a_schedule_stands_for_one_repa_term() -> None:
    assert Plan(align=plans.half_life(2.0, over=5)) == Plan(  # type: ignore[arg-type]
        align=(Align(weight=plans.half_life(2.0, over=5)),)
    )


def test_published_presets() -> None:
    """METHOD.md 1.5."""
    papers = [plans.PRESETS[name] for name in ("paper_v1", "paper_v3", "code_as_released")]
    assert [plan.depth for plan in papers] == [4, 5, 4]
    assert [plan.align[0].block for plan in papers] == [14, 18, 14]
    assert [plan.align[0].weight.value for plan in papers] == [4.0, 0.5, 6.0]
    assert [plan.align[0].loss for plan in papers] == ["nt_xent", "nt_xent", "cosine"]
    assert not plans.SIT.reads_encoder and plans.REPA.reads_encoder


def test_a_run_of_erw_0_1_is_read_without_its_plan() -> None:
    old = {"warmup": 400, "depth": 2, "align": {"kind": "constant", "value": 2.0, "over": 0}}
    run = from_dict(Run, {**to_dict(Run()), "plan": old | {"align_depth": 4, "loss": "nt_xent"}})
    assert run == Run(plan=Plan(align=()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plans.constant(float("nan")), "weight.value is nan"),
        (lambda: plans.half_life(1.0, over=0), "needs a number of steps > 0"),
        (lambda: Schedule("half_live", over=3), "did you mean half_life?"),
        (lambda: Plan(warmup=-1), "plan.warmup is -1; expected a number in .0, inf"),
        (lambda: Plan(warmup=3, align=()), "has nothing to learn"),
        (lambda: Plan(align=(Align(), Align())), "each needs its own"),
        (lambda: Align(temperature=0.0), "temperature is 0.0"),
        (lambda: Align(loss="cosin"), "did you mean cosine?"),
        (lambda: Align(target="teacher"), "expected encoder, encoder:NAME, ema, block or none"),
        (lambda: Align(target="ema", phase="full"), "need target_block"),
        (lambda: Align(target="none"), "needs phase full"),
        (lambda: Plan(warmup_batch=0), "plan.warmup_batch is 0"),
    ],
)
def test_impossible_values(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_terms_take_the_names_in_the_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    registries = {"loss": ALIGN_LOSSES, "projector": PROJECTORS, "normalize": TARGET_NORMS}
    for key, registry in registries.items():
        assert set(plans.OURS[key][1:]) <= registry.keys()
        for name in registry:
            teacher = {"target": "encoder:x#attention1", "projector": "none"}
            others = teacher if name == "attention" else {}
            assert getattr(Align(**{key: name, **others}), key) == name  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"plan.align {key} is 'mine'; "):
            Align(**{key: "mine"})  # type: ignore[arg-type]
        monkeypatch.setitem(registry, "mine", None)  # type: ignore[arg-type]
        assert getattr(Align(**{key: "mine"}), key) == "mine"  # type: ignore[arg-type]


def test_plans_are_values() -> None:
    louder = dataclasses.replace(plans.REPA, align=plans.repa(8, 2.0).align)
    assert louder(0).weights["align"] == 2.0 and plans.REPA(0).weights["align"] == 0.5
