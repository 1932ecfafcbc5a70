"""The figures of report, README and talks, in one house style.

Every function gives a matplotlib `Figure` from `Results` and draws nothing else; `style` turns it
into SVG, PNG or an element for a page. Sizes are in points, which are CSS pixels on a page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from erw.evaluation.callback import HIGHER
from erw.study import marks, style
from erw.study.compare import mean_curve, name_of
from erw.study.marks import PARTS, axis_for, flops_unit
from erw.study.results import Results, write_json
from erw.study.style import DARK, LIGHT, Theme
from erw.study.target import Track, mean_of

TITLES = {
    "flops": "FD-Lite2 over compute (lower is better)",
    "seconds": "FD-Lite2 over training time",
    "step": "FD-Lite2 over steps",
}


def score_figure(
    results: Results,
    *,
    over: str = "flops",
    size: tuple[float, float] = (1080, 440),
    theme: Theme = LIGHT,
) -> Any:
    """The score over a cost: a line per method, its seeds as dots and their spread as a band."""
    axis = axis_for(results, over)
    with marks.drawing(theme):
        names = [name_of(method) for method in results.methods]
        room = marks.room_for([f"{name} 000" for name in names])
        figure, ax = marks.canvas(size, title=TITLES[over], label=axis.label, right=room)
        ends = []
        for method in results.methods:
            color = theme.color(method, among=results.methods)
            points = mean_curve(results, method, key=axis.key)
            xs = [p.x / axis.scale for p in points]
            if len(results.seeds(method)) > 1:
                low, high = [p.low for p in points], [p.high for p in points]
                ax.fill_between(xs, low, high, color=color, alpha=0.16, linewidth=0)
                marks.seed_dots(ax, results, method, axis=axis, color=color)
            marker = style.MARKERS.get(method, "o")
            ax.plot(xs, [p.mean for p in points], color=color, marker=marker, markersize=6.5)
            ends.append(
                marks.End(
                    xs[-1], points[-1].mean, f"{name_of(method)} {points[-1].mean:.0f}", color
                )
            )
        ax.set_xlim(left=0)
        marks.floors(ax, results, theme=theme, short=size[0] < 600)
        if over == "flops":
            marks.saving_arrow(ax, results, axis=axis, theme=theme, short=size[0] < 600)
        marks.label_ends(figure, ax, ends)
    return figure


def curve_figure(
    results: Results,
    *,
    key: str,
    title: str,
    over: str = "flops",
    size: tuple[float, float] = (528, 330),
    theme: Theme = LIGHT,
) -> Any:
    """A training curve ("flow", "align", "loss") over a cost, the end of warm-up marked."""
    axis = axis_for(results, over)
    with marks.drawing(theme):
        names = tuple(dict.fromkeys(name.split("/")[0] for name in results.curves))
        room = marks.room_for([name_of(name) for name in names])
        figure, ax = marks.canvas(size, title=title, label=axis.label, right=room)
        ends: list[marks.End] = []
        values: list[float] = []
        labelled: set[str] = set()
        for name, curve in results.curves.items():
            method = name.split("/")[0]
            color = theme.color(method, among=names)
            pairs = [
                (x / axis.scale, y)
                for x, y in zip(curve[axis.key], curve[key], strict=True)
                if y is not None
            ]
            marks.boundary(ax, curve, axis=axis, theme=theme, color=color, said=method in labelled)
            if not pairs:
                continue
            xs, ys = zip(*pairs, strict=True)
            ax.plot(xs, ys, color=color, linewidth=1.8, alpha=0.9)
            values += ys
            if method not in labelled:
                ends.append(marks.End(xs[-1], ys[-1], name_of(method), color))
            labelled.add(method)
        ax.set_xlim(left=0)
        marks.trim(ax, values)
        marks.label_ends(figure, ax, ends)
    return figure


def ledger_figure(
    results: Results, *, size: tuple[float, float] = (1080, 230), theme: Theme = LIGHT
) -> Any:
    """Where each method's FLOPs went: a bar, split into warm-up, full, projector, teacher."""
    totals = {m: results.ledger[m]["total"] for m in results.methods if m in results.ledger}
    scale, unit = flops_unit(max((sum(t.values()) for t in totals.values()), default=1.0))
    with marks.drawing(theme):
        figure, ax = marks.canvas(
            size, title="", label=f"total cost, {unit}", right=20, top=40, left=62
        )
        ax.grid(False)
        for place, parts in enumerate(totals.values()):
            start = 0.0
            for color, part in zip(theme.parts, PARTS, strict=True):
                width = parts.get(part.replace("-", ""), 0) / scale
                ax.barh(place, width, left=start, height=0.62, color=color, edgecolor=theme.paper)
                if width > 0.045 * sum(parts.values()) / scale * max(1, 600 / size[0]):
                    share = f"{100 * width * scale / sum(parts.values()):.0f} %"
                    ax.text(start + width / 2, place, share, ha="center", va="center", fontsize=11)
                start += width
        ax.set_yticks(range(len(totals)), [name_of(m) for m in totals])
        ax.tick_params(axis="y", labelcolor=theme.ink)
        ax.invert_yaxis()
        marks.keys(figure, ax, theme=theme)
    return figure


def save_figure(
    draw: Callable[[Theme], Any], stem: str | Path, *, data: Mapping[str, Any]
) -> list[Path]:
    """Write `stem`-light and -dark as SVG and PNG, and the numbers behind them as `stem`.json."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for theme in (LIGHT, DARK):
        figure = draw(theme)
        with marks.drawing(theme):
            for ending, content in (
                ("svg", style.to_svg(figure).encode()),
                ("png", style.to_png(figure)),
            ):
                path = stem.with_name(f"{stem.name}-{theme.name}.{ending}")
                path.write_bytes(content)
                written.append(path)
    write_json(dict(data), stem.with_name(stem.name + ".json"))
    return [*written, stem.with_name(stem.name + ".json")]


def target_figure(
    record: Mapping[str, Any], theme: Theme = LIGHT, *, size: tuple[float, float] = (800, 400)
) -> Any:
    """What `erw.study.target.compared` gives: scores over cost, and where each meets the target."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    tracks = [Track(**track) for track in record["tracks"]]
    over, target = record["over"], record["target"]
    scale, unit = 1.0, over
    if over == "flops":
        scale, unit = flops_unit(max(track.costs[-1] for track in tracks))
    methods = list(dict.fromkeys(track.method for track in tracks))
    costs = {found["method"]: found["cost"] for found in record["reached"]}
    with marks.drawing(theme):
        room = marks.room_for([f"{name_of(method)} 0000" for method in methods])
        sense = "higher" if record["metric"].startswith(HIGHER) else "lower"
        title = f"{record['metric']} over {over} ({sense} is better)"
        label = f"training compute, {unit}" if over == "flops" else f"training {unit}"
        figure, ax = marks.canvas(size, title=title, label=label, right=room)
        ends = []
        for method in methods:
            color = theme.color(method, among=methods)
            mine = [track for track in tracks if track.method == method]
            mean = mean_of(mine)
            xs = [cost / scale for cost in mean.costs]
            for track in mine if len(mine) > 1 else ():
                seed = [cost / scale for cost in track.costs]
                ax.plot(seed, track.scores, color=color, alpha=0.35, linewidth=1.2)
            marker = style.MARKERS.get(method, "o")
            ax.plot(xs, mean.scores, color=color, marker=marker, markersize=6)
            last = mean.scores[-1]
            ends.append(marks.End(xs[-1], last, f"{name_of(method)} {last:.4g}", color))
        if target is not None:
            ax.axhline(target, color=theme.soft, linewidth=1.2, linestyle=(0, (4, 3)))
            low = ax.get_ylim()[0]
            ax.set_ylim(bottom=low)
            for method, cost in costs.items():
                if cost is not None:
                    color, x = theme.color(method, among=methods), cost / scale
                    ax.plot([x, x], [low, target], color=color, linewidth=1.4, linestyle="dotted")
        ax.set_xscale("log")  # as the interpolation is: the lines between points are straight
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(lambda cost, _: f"{cost:,.4g}")
        ax.xaxis.set_minor_locator(NullLocator())
        marks.label_ends(figure, ax, ends)
    return figure
