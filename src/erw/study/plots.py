"""The figures of report, README and talks: any score or loss by name, over any cost.

Every function gives a matplotlib `Figure` in one style, in a light or a dark theme. Sizes are in
points, which are CSS pixels on a page. Colours are of Okabe and Ito, distinct with any colour
vision; a method has the same one everywhere.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from erw.evaluation.callback import HIGHER
from erw.study.compare import flops_unit, label_of, mean_curve, speed_up
from erw.study.results import COSTS, RunResult, binned, by_method

MARKERS = {"SiT": "o", "REPA": "s", "ERW": "D"}
TITLES = {"flow": "Flow-matching loss", "align": "Alignment loss"}
LABELS = {"flops": "compute", "seconds": "time"}
WIDE, HALF = (1056.0, 430.0), (520.0, 320.0)
GAP = 16.0  # of labels
Runs = Sequence[RunResult]
Size = tuple[float, float]
POINTS: dict[str, Any] = {"textcoords": "offset points"}
DASHED: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance: `series` by method, `spare` in turn for other names."""

    name: str
    paper: str
    panel: str
    ink: str
    soft: str
    line: str
    series: Mapping[str, str]
    spare: tuple[str, ...]

    def colors(self, names: Iterable[str]) -> dict[str, str]:
        """The colour of each method; names without their own take the spare ones in turn, then
        those of methods that are not there."""
        names = list(dict.fromkeys(names))
        others = [name for name in names if name not in self.series]
        unused = [color for name, color in self.series.items() if name not in names]
        return {**self.series, **dict(zip(others, cycle([*self.spare, *unused]), strict=False))}


LIGHT = Theme(
    *("light", "#ffffff", "#f6f7f9", "#16181d", "#626873", "#e3e5ea"),
    series={"SiT": "#6f7683", "REPA": "#0072b2", "ERW": "#d55e00"},
    spare=("#009e73", "#a0528a", "#9a7400", "#3b4cc0"),
)
DARK = Theme(
    *("dark", "#14161b", "#1b1e25", "#eceef2", "#a0a6b2", "#2b2f38"),
    series={"SiT": "#a3abb9", "REPA": "#56b4e9", "ERW": "#ff9140"},
    spare=("#2fc79b", "#d78bc0", "#d6b03c", "#8ea2ff"),
)


class Line(NamedTuple):
    """A line in the colour of its name; `text`, or else its name, is written at its end."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    text: str = ""


def style(theme: Theme) -> Any:
    """The context in which a figure of the theme is drawn and saved."""
    import matplotlib.style

    parts = {
        theme.paper: ("figure.facecolor", "axes.facecolor"),
        theme.ink: ("text.color",),
        theme.soft: ("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"),
        theme.line: ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"),
    }
    colors = {part: color for color, names in parts.items() for part in names}
    return matplotlib.style.context([Path(__file__).with_name("figures.mplstyle"), colors])


def lines_figure(
    lines: Sequence[Line], theme: Theme, *, title: str, label: str, size: Size = (800, 400),
    level: tuple[str, float] | None = None, decorate: Callable[[Any], None] = lambda ax: None,
    **look: Any,
) -> Any:  # fmt: skip
    """Lines with a dot at each value (or another `look`), their names at their ends.

    `level` is a name and a value to compare with; `decorate` draws more on the axes.
    """
    from matplotlib.figure import Figure

    colors = theme.colors(line.name for line in lines)
    with style(theme):
        (width, height), left, top, bottom = size, 44, 44, 50
        right = max([24.0, *(16 + 7.8 * len(line.text or line.name) for line in lines)])
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        spans = 1 - (left + right) / width, 1 - (bottom + top) / height
        ax: Any = figure.add_axes((left / width, bottom / height, *spans))
        figure.text(0.0, 1 - 14 / height, title, ha="left", va="center", weight="bold")
        ax.set_xlabel(label, loc="left", labelpad=7)
        if width < 600:
            ax.locator_params(axis="both", nbins=5)
        look = {"markersize": 4, "linewidth": 2} | look
        for line in lines:
            marker, color = MARKERS.get(line.name, "o"), colors[line.name]
            ax.plot(line.xs, line.ys, color=color, **{"marker": marker} | look)
        if level is not None:
            ax.axhline(level[1], color=theme.soft, **DASHED)
            options = {"xycoords": ("axes fraction", "data"), "color": theme.soft, **POINTS}
            ax.annotate(level[0], (0, level[1]), (4, 4), fontsize=11, **options)
        decorate(ax)
        _label_ends(ax, [line for line in lines if len(line.xs)], colors)
    return figure


def _label_ends(ax: Any, lines: Sequence[Line], colors: Mapping[str, str]) -> None:
    """The name of each line right of all, once, above the axis and `GAP` points apart or more."""
    ax.autoscale_view()  # else transData has the limits of empty axes
    firsts = list({line.name: line for line in reversed(lines)}.values())
    # More than twelve do not fit below each other.
    ends = sorted(firsts[:: -(-len(firsts) // 12)], key=lambda line: line.ys[-1])
    heights = [float(ax.transData.transform((line.xs[-1], line.ys[-1]))[1]) for line in ends]
    moved = heights[:1]
    for height in heights[1:]:
        moved.append(max(height, moved[-1] + GAP))
    shift = (sum(heights) - sum(moved)) / len(moved)  # their mean stays
    shift = max(shift, ax.bbox.y0 + GAP / 2 - min(moved))
    right = max(line.xs[-1] for line in ends)
    for line, old, new in zip(ends, heights, moved, strict=True):
        options = {"weight": "bold", "va": "center", "annotation_clip": False, **POINTS}
        place, offset = (right, line.ys[-1]), (9, new + shift - old)
        ax.annotate(line.text or line.name, place, offset, color=colors[line.name], **options)


def score_figure(
    runs: Runs, metric: str, theme: Theme = LIGHT, *, over: str = "flops", size: Size = WIDE
) -> Any:
    """A score over a cost: a line per method, its seeds as dots and their spread as a band.

    Over FLOPs an arrow shows where the last method had the first one's final score.
    """
    scale, label = cost_axis(runs, over)
    curves = {
        name: [run.curve("values", metric, over=over, scale=scale) for run in group]
        for name, group in by_method(runs).items()
    }
    means, colors = {name: mean_curve(some) for name, some in curves.items()}, theme.colors(curves)
    first, *_, last = *curves, *curves

    def decorate(ax: Any) -> None:
        ax.set_xlim(left=0)
        for name, some in curves.items() if len(runs) > len(curves) else ():
            low, high = (mean_curve(some, of).values for of in (min, max))
            color = {"color": colors[name]}
            ax.fill_between(means[name].costs, low, high, alpha=0.16, linewidth=0, **color)
            for curve in some:
                ax.plot(curve.costs, curve.values, ".", markersize=5, alpha=0.55, **color)
        if over != "flops" or first == last:
            return
        ratio = speed_up(curves[last], curves[first], metric=metric)
        if ratio.value:
            x, y = means[first].costs[-1], means[first].values[-1]
            arrow = {"arrowstyle": "-|>,head_width=0.25,head_length=0.5", "linewidth": 1.4}
            arrow |= {"color": colors[last], "linestyle": (0, (1, 2)), "shrinkA": 9, "shrinkB": 0}
            ax.annotate("", (ratio.value * x, y), (x, y), arrowprops=arrow)
            text = f"{'≤ ' if ratio.at_most else ''}{ratio.value:.2f}×"
            options = {"weight": "bold", "fontsize": 12, "ha": "center", "color": colors[last]}
            ax.annotate(text, ((1 + ratio.value) / 2 * x, y), (0, 7), **options, **POINTS)

    lines = [Line(n, c.costs, c.values, f"{n} {c.values[-1]:.4g}") for n, c in means.items()]
    sense = "higher" if metric.startswith(HIGHER) else "lower"
    title = f"{label_of(metric)} over {label.partition(',')[0]} ({sense} is better)"
    options: dict[str, Any] = {"size": size, "decorate": decorate, "markersize": 6.5}
    return lines_figure(lines, theme, title=title, label=label, **options, linewidth=2.4)


def dots_figure(runs: Runs, metric: str, theme: Theme = LIGHT) -> Any:
    """A score of many methods, a row each, the best at the end on top: the last mean dark, with its
    seeds' range, means of the scores before it the paler the earlier."""
    from matplotlib.figure import Figure

    sign = -1 if metric.startswith(HIGHER) else 1
    curves = {
        name: [run.curve("values", metric, over="flops", scale=1.0) for run in group]
        for name, group in by_method(runs).items()
    }
    means = {name: mean_curve(some).values for name, some in curves.items()}
    names = sorted(means, key=lambda name: sign * means[name][-1])
    colors = {name: theme.series.get(name, theme.spare[0]) for name in names}
    with style(theme):
        left, top, bottom = max(7.2 * len(name) for name in names) + 12, 44, 44
        width, height = WIDE[0], top + bottom + 21.0 * len(names)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        spans = 1 - (left + 70) / width, 1 - (bottom + top) / height
        ax: Any = figure.add_axes((left / width, bottom / height, *spans))
        sense = "higher" if sign < 0 else "lower"
        title = (
            f"{label_of(metric)} of each row ({sense} is better); paler: earlier, at less compute"
        )
        figure.text(0.0, 1 - 14 / height, title, ha="left", va="center", weight="bold")
        for y, name in enumerate(names):
            values, color = means[name], colors[name]
            for age, value in enumerate(reversed(values)):
                ax.plot(value, y, "o", color=color, markersize=7, alpha=0.4**age)
            ends = [curve.values[-1] for curve in curves[name]]
            ax.plot([min(ends), max(ends)], [y, y], color=color, linewidth=2, alpha=0.5)
            text = {"va": "center", "color": color, "weight": "bold", **POINTS}
            ax.annotate(
                f"{values[-1]:.4g}", (1, y), (8, 0), xycoords=("axes fraction", "data"), **text
            )
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="x")
    return figure


def curve_figure(
    runs: Runs, group: str, name: str, theme: Theme = LIGHT, *, over: str = "flops",
    size: Size = HALF,
) -> Any:  # fmt: skip
    """A loss, weight or validation loss by name over a cost, the end of warm-up marked."""
    scale, label = cost_axis(runs, over)
    curves = [run.curve(group, name, over=over, scale=scale) for run in runs]
    lines = [
        Line(run.method, *binned(curve, warmup=run.warmup["step"] if run.warmup else 0)[:2])
        for run, curve in zip(runs, curves, strict=True)
    ]

    def decorate(ax: Any) -> None:
        for method, group in by_method(runs).items():
            if (warm := group[0].warmup) is None:
                continue
            x, color = warm[COSTS[over]] / scale, theme.colors(by_method(runs))[method]
            ax.axvspan(0, x, color=color, alpha=0.07, linewidth=0)
            ax.axvline(x, color=color, **DASHED)
            options = {"xycoords": ("data", "axes fraction"), "fontsize": 11, **POINTS}
            ax.annotate("warm-up ends", (x, 1), (5, -11), color=theme.soft, **options)
        ax.set_xlim(left=0)
        values = sorted(y for line in lines for y in line.ys)
        low, high = values[0], values[int(0.97 * (len(values) - 1))]
        if len(values) >= 20 and high > low:  # the first fall would flatten all that follows
            ax.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))

    title = TITLES.get(name, name) + " of held-out images" * (group == "validation")
    look: dict[str, Any] = {"marker": "", "linewidth": 1.8, "alpha": 0.9, "decorate": decorate}
    return lines_figure(lines, theme, title=title, label=label, size=size, **look)


def times_figure(runs: Runs, theme: Theme = LIGHT, *, size: Size = HALF) -> Any:
    """The last validation loss of each run at each of its fixed times."""
    none = {"times": (), "flow_by_time": ()}
    ends = [(run.method, [none, *run.lines["validation"]][-1]) for run in runs]
    lines = [Line(method, last["times"], last["flow_by_time"]) for method, last in ends]
    title, label = "The same by time, at the end", "noise time, 0 is clean"
    return lines_figure(lines, theme, title=title, label=label, size=size)


def samples_figure(runs: Runs, theme: Theme = LIGHT) -> Any:
    """The last preview of the first run of each method, side by side."""
    import matplotlib.image
    from matplotlib.figure import Figure

    previews = {
        name: sorted(some[0].path.glob("previews/*.png")) for name, some in by_method(runs).items()
    }
    pictures = {
        name: matplotlib.image.imread(paths[-1]) for name, paths in previews.items() if paths
    }
    with style(theme):
        figure = Figure(figsize=(4.4 * len(pictures), 5))
        for i, (name, pixels) in enumerate(pictures.items(), start=1):
            ax = figure.add_subplot(1, len(pictures), i, title=name)
            ax.imshow(pixels, interpolation="nearest")
            ax.set_axis_off()
    return figure


def cost_axis(runs: Runs, over: str) -> tuple[float, str]:
    """Divisor and label of a cost axis, in the unit that fits the runs' range."""
    most, label = max(run.last[COSTS[over]] for run in runs), f"training {LABELS.get(over, over)}"
    scale, unit = 1.0, ""
    if over == "flops":
        scale, unit = flops_unit(most)
    elif over == "seconds":
        times = (3600.0, "hours"), (60.0, "minutes")
        scale, unit = next((time for time in times if most > 2.5 * time[0]), (1.0, "s"))
    elif over in ("steps", "images") and most > 20_000:
        scale, unit = 1000.0, "thousands"
    return scale, f"{label}, {unit}" if unit else label


def to_bytes(figure: Any, theme: Theme, ending: str) -> bytes:
    """The figure as "svg" or "png" (two pixels a point), the same bytes each time."""
    stream = io.BytesIO()
    fixed = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[ending]
    with style(theme):
        figure.savefig(stream, format=ending, dpi=144, metadata=fixed)
    return stream.getvalue()
