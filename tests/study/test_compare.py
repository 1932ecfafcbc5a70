"""The comparison: log-linear cost to a target, shares of compute, their spread and the words."""

import math
from pathlib import Path

import pytest

from erw.errors import DataError
from erw.study.compare import (
    cost_to_target,
    flops_unit,
    mean_curve,
    speed_up,
    speed_ups,
)
from erw.study.results import Curve, by_method, read_runs
from helpers.synthetic_study import SCORES, write_study

COSTS = (10.0, 20.0, 40.0, 80.0)
FID = "fid"


def line(start: float, slope: float = 30.0) -> Curve:
    """A score that falls linearly in log(cost)."""
    return Curve(COSTS, tuple(start - slope * math.log(cost) for cost in COSTS), (1, 2, 4, 8))


@pytest.mark.parametrize("true", [10.0, 13.0, 31.7, 80.0])
def test_cost_to_target_of_a_line_in_log_cost_is_exact(true: float) -> None:
    cost, at_most = cost_to_target(line(400), 400 - 30 * math.log(true), metric=FID) or (0, True)
    assert cost == pytest.approx(true) and not at_most


def test_cost_to_target_takes_the_first_crossing_and_says_what_it_cannot_know() -> None:
    def cost(values: tuple[float, ...], target: float) -> tuple[float, bool] | None:
        curve = Curve((1.0, 2.0, 4.0, 8.0)[: len(values)], values, tuple(range(len(values))))
        return cost_to_target(curve, target, metric=FID)

    assert cost((9, 8, 7), 6) is None
    assert cost((9, 8, 7), 10) == (1, True)
    bumpy = cost((9, 5, 7, 4), 6)
    assert bumpy and 1 < bumpy[0] < 2


def test_higher_is_better_where_it_is() -> None:
    up = line(400)._replace(values=tuple(-value for value in line(400).values))
    found = cost_to_target(up, -(400 - 30 * math.log(31.7)), metric="inception_score")
    assert found == (pytest.approx(31.7), False)


def test_speed_up_of_lines_is_exact() -> None:
    found = speed_up([line(370)], [line(400)], metric=FID)
    assert found.value == pytest.approx(math.exp(-1))
    assert speed_up([line(400)], [line(370)], metric=FID).value is None
    many = speed_up([line(370 + seed) for seed in range(3)], [line(400)], metric=FID)
    assert many.low and many.value and many.high and many.low < many.value < many.high


def test_means_are_of_the_steps_that_all_have() -> None:
    short = Curve((20.0, 80.0), (9.0, 5.0), (2, 8))
    mean = mean_curve([line(400), short])
    assert mean.costs == (20, 80) and mean.values[1] == pytest.approx((line(400).values[3] + 5) / 2)
    with pytest.raises(DataError, match="no step is scored"):
        mean_curve([line(400), line(400)._replace(steps=(3, 5, 6, 7))])


def test_power_laws_have_a_closed_form(tmp_path: Path) -> None:
    """Scores a (4 c)^-p at fractions c."""
    groups = by_method(read_runs([write_study(tmp_path, points=50, pictures=False)]))
    curves = {name: [r.curve("values", "fd_lite2") for r in runs] for name, runs in groups.items()}
    pair, ratio = next(iter(speed_ups(curves, metric="fd_lite2").items()))
    assert pair == ("ERW", "SiT")
    (scale, power), target = SCORES["ERW"], SCORES["SiT"][0] * 4 ** -SCORES["SiT"][1]
    assert ratio.value == pytest.approx((target / scale) ** (-1 / power) / 4, rel=2e-3)
    assert not ratio.at_most


def test_units_fit() -> None:
    assert flops_unit(3e15) == (1e15, "PFLOP") and flops_unit(5.0) == (1e9, "GFLOP")
