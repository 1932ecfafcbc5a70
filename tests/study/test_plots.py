"""Figures: one style, same bytes each time, labels that do not touch."""

import itertools
import json
from pathlib import Path

import pytest

from erw.study import plots
from erw.study.knowledge import save_knowledge
from erw.study.plots import DARK, LIGHT, Theme
from erw.study.results import RunResult, by_method, read_runs
from helpers.synthetic_study import WARMUP, lines_of, write_run, write_study


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunResult]:
    return read_runs([write_study(tmp_path_factory.mktemp("study"), seeds=2)])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_method_has_its_colour_in_every_figure(runs: list[RunResult], theme: Theme) -> None:
    figures = [
        plots.score_figure(runs, "fd_lite2", theme),
        plots.score_figure(runs, "fd_lite2", theme, over="seconds"),
        plots.curve_figure(runs, "losses", "flow", theme),
        plots.curve_figure(runs, "validation", "flow", theme),
        plots.times_figure(runs, theme),
    ]
    for figure in figures:
        svg = plots.to_bytes(figure, theme, "svg").decode()
        for method in by_method(runs):
            assert theme.series[method] in svg, f"{method} is not drawn in its colour"


def test_the_same_runs_give_the_same_bytes(runs: list[RunResult]) -> None:
    one, two = (
        plots.to_bytes(plots.score_figure(runs, "fd_lite2"), LIGHT, "svg") for _ in range(2)
    )
    assert one == two


def test_warm_up_ends_where_it_ends(runs: list[RunResult]) -> None:
    axes = plots.curve_figure(runs, "losses", "align", over="steps").axes[0]
    ends = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert ends == [WARMUP], "once a method"


def test_every_value_is_in_the_validation_figure(runs: list[RunResult]) -> None:
    lines = plots.times_figure(runs).axes[0].lines
    last = runs[0].lines["validation"][-1]
    assert len(lines) == len(runs)
    assert list(lines[0].get_xdata()) == last["times"]
    assert list(lines[0].get_ydata()) == last["flow_by_time"]


def test_labels_at_line_ends_keep_their_distance(runs: list[RunResult]) -> None:
    axes = plots.score_figure(runs, "fd_lite2").axes[0]
    texts = [t for t in axes.texts if t.get_text().startswith(("SiT", "REPA", "ERW"))]
    heights = sorted(axes.transData.transform(t.xy)[1] + t.get_position()[1] for t in texts)
    assert len(texts) == 3
    assert all(b - a > 15 for a, b in itertools.pairwise(heights))


def test_rows_of_dots_stand_by_their_last_score(runs: list[RunResult]) -> None:
    ax = plots.dots_figure(runs, "fd_lite2").axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    last = {
        name: sum(run.curve("values", "fd_lite2").values[-1] for run in group) / len(group)
        for name, group in by_method(runs).items()
    }
    assert names == sorted(last, key=lambda name: last[name])
    dots = {name: [] for name in names}
    for line in ax.lines:
        if len(line.get_xdata()) == 1:
            dots[names[round(line.get_ydata()[0])]].append((line.get_alpha(), line.get_xdata()[0]))
    for name in names:
        assert max(dots[name])[1] == pytest.approx(last[name]), "the darkest is the last"
    spans = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert len(spans) == len(names) and all(low <= high for low, high in spans)


def test_axes_have_units_that_fit(runs: list[RunResult]) -> None:
    assert plots.cost_axis(runs, "flops") == (1e12, "training compute, TFLOP")
    assert plots.cost_axis(runs, "seconds") == (60.0, "training time, minutes")
    assert plots.cost_axis(runs, "steps") == (1.0, "training steps")
    assert plots.cost_axis(runs, "images") == (1000.0, "training images, thousands")


def test_other_names_have_spare_colours(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name, lines_of("ERW", 0)) for name in ("one", "two")]
    svg = plots.to_bytes(plots.score_figure(read_runs(folders), "fd_lite2"), LIGHT, "svg").decode()
    assert LIGHT.spare[0] in svg and LIGHT.spare[1] in svg


def test_saved_figures_come_in_both_themes_with_their_numbers(tmp_path: Path) -> None:
    points = [{"run": "a", "step": 5, "time": 0.0, "depth": d, "value": d / 4} for d in (1, 2, 3)]
    record = {"metric": "cknna", "reference": None, "points": points}
    paths = save_knowledge(record, tmp_path / "fd")
    names = {path.name for path in paths}
    assert names == {f"fd-{t}.{e}" for t in ("light", "dark") for e in ("svg", "png")} | {"fd.json"}
    assert all(path.stat().st_size > 0 for path in paths)
    assert json.loads((tmp_path / "fd.json").read_text()) == record
