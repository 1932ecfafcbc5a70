"""Figures: one style, same bytes each time, labels that do not touch."""

import itertools
import json

import pytest

from erw.study import marks, plots, style
from helpers.synthetic_study import synthetic


@pytest.mark.parametrize("theme", [style.LIGHT, style.DARK])
def test_a_method_has_its_colour_in_every_figure(theme):
    results = synthetic(seeds=2)
    figures = [
        plots.score_figure(results, theme=theme),
        plots.score_figure(results, over="seconds", theme=theme),
        plots.curve_figure(results, key="flow", title="Flow", theme=theme),
    ]
    for figure in figures:
        svg = style.to_svg(figure)
        for method in results.methods:
            assert theme.color(method) in svg, f"{method} is not drawn in its colour"


def test_the_same_results_give_the_same_bytes():
    first, second = (style.to_svg(plots.score_figure(synthetic())) for _ in range(2))
    assert first == second


def test_a_figure_for_a_page_has_no_colour_of_its_own():
    figure = plots.score_figure(synthetic(seeds=3), theme=style.PAGE)
    svg = style.inline_svg(figure, name="fd", label="scores")
    assert "var(--erw)" in svg and "var(--ink)" in svg
    assert not [code for code in style.VARIABLES if code in svg]
    assert "http" not in svg and "<metadata" not in svg and "<style" not in svg
    assert 'role="img"' in svg and 'aria-label="scores"' in svg


def test_every_page_colour_is_declared_in_both_themes():
    for theme in (style.LIGHT, style.DARK):
        declared = style.css_variables(theme)
        for name in style.VARIABLES.values():
            assert f"--{name}:" in declared


def test_the_ledger_names_its_parts_and_methods():
    svg = style.inline_svg(
        plots.ledger_figure(synthetic(), theme=style.PAGE), name="ledger", label="ledger"
    )
    for word in (*plots.PARTS, "SiT", "REPA", "ERW"):
        assert f">{word}</text>" in svg


def test_warm_up_ends_where_it_ends():
    results = synthetic()
    figure = plots.curve_figure(results, key="align", title="Alignment", over="step")
    axes = figure.axes[0]
    ends = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert ends == [max(s for s, w in _steps(results, "erw/0") if w)] and ends[0] <= 600


def _steps(results, name):
    curve = results.curves[name]
    return zip(curve["step"], curve["warmup"], strict=True)


def test_labels_at_line_ends_keep_their_distance():
    figure = plots.score_figure(synthetic())
    names = ("SiT", "REPA", "ERW")
    texts = [t for t in figure.axes[0].texts if t.get_text().startswith(names)]
    heights = sorted(
        figure.axes[0].transData.transform(t.xy)[1] + t.get_position()[1] for t in texts
    )
    assert len(texts) == 3
    assert all(b - a > 15 for a, b in itertools.pairwise(heights))


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0, 50], [0, 50]),
        ([10, 10], [5, 15]),
        ([10, 12, 40], [6, 16, 40]),
        ([0, 0, 0], [-10, 0, 10]),
    ],
)
def test_spread_moves_as_little_as_it_can(heights, expected):
    assert marks.spread(heights, gap=10) == pytest.approx(expected)


def test_axes_have_units_that_fit():
    results = synthetic()
    assert marks.axis_for(results, "flops").label.endswith("TFLOP")
    assert marks.axis_for(results, "seconds").label.endswith("s")
    assert marks.flops_unit(3e15) == (1e15, "PFLOP")
    with pytest.raises(ValueError, match="flops, seconds, step"):
        marks.axis_for(results, "watts")


def test_floors_near_the_scores_are_lines_and_far_ones_a_note():
    results = synthetic()
    near = synthetic().__class__(**{**vars(results), "floors": {"train_images": 170.0}})
    words = [t.get_text() for t in plots.score_figure(near).axes[0].texts]
    assert "training images 170" in words
    words = [t.get_text() for t in plots.score_figure(results).axes[0].texts]
    assert any("floors" in w and "31" in w and "12" in w for w in words)


def test_saved_figures_come_in_both_themes_with_their_numbers(tmp_path):
    results = synthetic()
    rows = [row._asdict() for row in results.rows]
    paths = plots.save_figure(
        lambda theme: plots.score_figure(results, theme=theme), tmp_path / "fd", data={"rows": rows}
    )
    names = {path.name for path in paths}
    assert names == {f"fd-{t}.{e}" for t in ("light", "dark") for e in ("svg", "png")} | {"fd.json"}
    assert all(path.stat().st_size > 0 for path in paths)
    assert json.loads((tmp_path / "fd.json").read_text())["rows"] == rows
