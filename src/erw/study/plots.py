"""The figures of report, README and talks: any score or loss by name, over any cost.

Every function gives a matplotlib `Figure` in one house style, in a light or a dark theme. Sizes are
in points, which are CSS pixels on a page. Colours are of Okabe and Ito, told apart with any colour
vision; a method has the same one everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from erw.evaluation.callback import HIGHER
from erw.io import write_bytes, write_json
from erw.study.compare import by_method, flops_unit, label_of, mean_curve, score_curves, speed_up
from erw.study.results import COSTS, RunResult, binned

MARKERS = {"SiT": "o", "REPA": "s", "ERW": "D"}
TITLES = {"flow": "Flow-matching loss", "align": "Alignment loss"}
LABELS = {"flops": "training compute", "seconds": "training time", "steps": "training steps"}
PARTS = ("warm-up", "full steps", "teacher")
WIDE = (1056.0, 430.0)
FONTS = ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"]


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
    parts: tuple[str, str, str]

    def color(self, method: str, among: Sequence[str] = ()) -> str:
        """The colour of a method; a name without its own takes the spare one of its place."""
        others = [name for name in among if name not in self.series]
        place = others.index(method) if method in others else 0
        return self.series.get(method, self.spare[place % len(self.spare)])


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    panel="#f6f7f9",
    ink="#16181d",
    soft="#626873",
    line="#e3e5ea",
    series={"SiT": "#6f7683", "REPA": "#0072b2", "ERW": "#d55e00"},
    spare=("#009e73", "#a0528a", "#9a7400", "#3b4cc0"),
    parts=("#f0a35e", "#8d95a5", "#b9a0d0"),
)
DARK = Theme(
    name="dark",
    paper="#14161b",
    panel="#1b1e25",
    ink="#eceef2",
    soft="#a0a6b2",
    line="#2b2f38",
    series={"SiT": "#a3abb9", "REPA": "#56b4e9", "ERW": "#ff9140"},
    spare=("#2fc79b", "#d78bc0", "#d6b03c", "#8ea2ff"),
    parts=("#d98a3f", "#69717f", "#8a73a3"),
)


class End(NamedTuple):
    """A label at the end of a line."""

    x: float
    y: float
    text: str
    color: str


def style(theme: Theme) -> Any:
    """The context in which a figure of the theme is drawn and saved."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": FONTS,
            "font.size": 13,
            "figure.facecolor": theme.paper,
            "axes.facecolor": theme.paper,
            "axes.edgecolor": theme.line,
            "axes.labelcolor": theme.soft,
            "axes.linewidth": 1.0,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.spines.left": False,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "grid.color": theme.line,
            "grid.linewidth": 1.0,
            "legend.frameon": False,
            "text.color": theme.ink,
            "xtick.color": theme.line,
            "ytick.color": theme.line,
            "xtick.labelcolor": theme.soft,
            "ytick.labelcolor": theme.soft,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
            "ytick.major.size": 0,
            "xtick.major.size": 4,
            "lines.solid_capstyle": "round",
            "lines.linewidth": 2.4,
            "svg.fonttype": "none",
            "svg.hashsalt": "erw",
        }
    )


def canvas(
    size: tuple[float, float], *, title: str, label: str, ends: Sequence[str] = (), top: float = 44
) -> tuple[Any, Any]:
    """A figure with one axes, its title at the top left, and room for labels at line ends."""
    from matplotlib.figure import Figure

    width, height = size
    left, bottom = 44, 50
    right = max(24.0, 16 + 7.8 * max(map(len, ends))) if ends else 24.0
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    ax = figure.add_axes(box)
    figure.text(0.0, 1 - 14 / height, title, ha="left", va="center", weight="bold")
    ax.set_xlabel(label, loc="left", labelpad=7)
    if width < 600:
        ax.locator_params(axis="both", nbins=5)
    return figure, ax


def label_ends(ax: Any, ends: Sequence[End], *, gap: float = 16.0) -> None:
    """Names beside the lines' ends, at least `gap` points apart vertically."""
    ends = sorted(ends, key=lambda end: end.y)
    heights = [float(ax.transData.transform((end.x, end.y))[1]) for end in ends]
    for end, before, height in zip(ends, heights, spread(heights, gap=gap), strict=True):
        ax.annotate(
            end.text, (end.x, end.y), (9, height - before), textcoords="offset points",
            color=end.color, weight="bold", va="center", annotation_clip=False,
        )  # fmt: skip


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Rising heights moved so that neighbours are `gap` apart; a moved group keeps its mean."""
    groups: list[list[float]] = []

    def bottom(group: list[float]) -> float:
        return sum(group) / len(group) - gap * (len(group) - 1) / 2

    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-2]) + gap * len(groups[-2]) > bottom(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [bottom(group) + i * gap for group in groups for i in range(len(group))]


def cost_axis(runs: Sequence[RunResult], over: str) -> tuple[float, str]:
    """Divisor and label of a cost axis, in the unit that fits the runs' range."""
    most = max(
        max(run.curve("losses", name, over=over).costs)
        for run in runs
        for name in run.names("losses")
    )
    scale, unit = 1.0, "s" if over == "seconds" else ""
    if over == "flops":
        scale, unit = flops_unit(most)
    elif over == "seconds" and most > 150:
        scale, unit = (3600.0, "hours") if most > 2.5 * 3600 else (60.0, "minutes")
    elif over in ("steps", "images") and most > 20_000:
        scale, unit = 1000.0, "thousands"
    return scale, ", ".join(filter(None, (LABELS.get(over, f"training {over}"), unit)))


def score_figure(
    runs: Sequence[RunResult],
    metric: str,
    theme: Theme = LIGHT,
    *,
    over: str = "flops",
    size: tuple[float, float] = WIDE,
    target: float | None = None,
) -> Any:
    """A score over a cost: a line per method, its seeds as dots and their spread as a band.

    Over FLOPs an arrow shows where the last method had the first one's final score, unless there is
    a `target`, which is a line.
    """
    groups = by_method(runs)
    scale, label = cost_axis(runs, over)
    curves = {name: score_curves(group, metric, over=over) for name, group in groups.items()}
    means = {name: mean_curve(some) for name, some in curves.items()}
    better = "higher" if metric.startswith(HIGHER) else "lower"
    title = f"{label_of(metric)} over {label.partition(',')[0]} ({better} is better)"
    with style(theme):
        figure, ax = canvas(size, title=title, label=label, ends=[f"{n} 0000" for n in groups])
        ends = []
        for name, mean in means.items():
            color, xs = theme.color(name, list(groups)), [x / scale for x in mean.costs]
            if len(curves[name]) > 1:
                at = [dict(zip(c.steps, c.values, strict=True)) for c in curves[name]]
                rows = [[values[step] for values in at] for step in mean.steps]
                low, high = [min(row) for row in rows], [max(row) for row in rows]
                ax.fill_between(xs, low, high, color=color, alpha=0.16, linewidth=0)
                for curve in curves[name]:
                    dots = [x / scale for x in curve.costs]
                    ax.plot(dots, curve.values, ".", color=color, markersize=5, alpha=0.55)
            ax.plot(xs, mean.values, color=color, marker=MARKERS.get(name, "o"), markersize=6.5)
            ends.append(End(xs[-1], mean.values[-1], f"{name} {mean.values[-1]:.4g}", color))
        ax.set_xlim(left=0)
        if target is not None:
            ax.axhline(target, color=theme.soft, linewidth=1.2, linestyle=(0, (4, 3)))
        elif over == "flops" and len(groups) > 1:
            first, *_, last = groups
            ratio = speed_up(curves[last], curves[first], metric=metric)
            _arrow(ax, ratio, means[first], scale, color=theme.color(last, list(groups)))
        label_ends(ax, ends)
    return figure


def _arrow(ax: Any, ratio: Any, goal: Any, scale: float, *, color: str) -> None:
    """From the end of a curve to where another one had the same score."""
    if ratio.value is None:
        return
    right, y = goal.costs[-1] / scale, goal.values[-1]
    left = ratio.value * right
    arrow = {"arrowstyle": "-|>,head_width=0.25,head_length=0.5", "color": color, "linewidth": 1.4}
    arrow |= {"linestyle": (0, (1, 2)), "shrinkA": 9, "shrinkB": 0}
    ax.annotate("", (left, y), (right, y), arrowprops=arrow)
    text = f"{'≤ ' if ratio.at_most else ''}{ratio.value:.2f}×"
    ax.annotate(
        text, ((left + right) / 2, y), (0, 7), textcoords="offset points", color=color,
        weight="bold", fontsize=12, ha="center",
    )  # fmt: skip


def curve_figure(
    runs: Sequence[RunResult],
    group: str,
    name: str,
    theme: Theme = LIGHT,
    *,
    over: str = "flops",
    size: tuple[float, float] = (520, 320),
) -> Any:
    """A loss, weight or validation loss by name over a cost, the end of warm-up marked."""
    methods = list(by_method(runs))
    scale, label = cost_axis(runs, over)
    title = TITLES.get(name, name) + " of held-out images" * (group == "validation")
    with style(theme):
        figure, ax = canvas(size, title=title, label=label, ends=methods)
        ends: dict[str, End] = {}
        values: list[float] = []
        for run in runs:
            color = theme.color(run.method, methods)
            warm = run.warmup
            if warm and run.method not in ends:
                x = warm[COSTS[over]] / scale
                ax.axvspan(0, x, color=color, alpha=0.07, linewidth=0)
                ax.axvline(x, color=color, linewidth=1.2, linestyle=(0, (4, 3)))
                ax.annotate(
                    "warm-up ends",
                    (x, 1),
                    (5, -11),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    color=theme.soft,
                    fontsize=11,
                )
            curve = run.curve(group, name, over=over)
            if not curve.costs:
                continue
            curve = binned(curve, warmup=warm["step"] if warm else 0)
            xs = [x / scale for x in curve.costs]
            ax.plot(xs, curve.values, color=color, linewidth=1.8, alpha=0.9)
            values += curve.values
            ends.setdefault(run.method, End(xs[-1], curve.values[-1], run.method, color))
        ax.set_xlim(left=0)
        # The first fall would flatten all that follows.
        low, high = min(values), sorted(values)[int(0.97 * (len(values) - 1))]
        if len(values) >= 20 and high > low:
            ax.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))
        label_ends(ax, list(ends.values()))
    return figure


def times_figure(
    runs: Sequence[RunResult], theme: Theme = LIGHT, *, size: tuple[float, float] = (520, 320)
) -> Any:
    """The last validation loss of each run at each of its fixed times."""
    methods = list(by_method(runs))
    with style(theme):
        title, label = "The same by time, at the end", "noise time, 0 is clean"
        figure, ax = canvas(size, title=title, label=label, ends=methods)
        ends: dict[str, End] = {}
        for run in runs:
            if lines := run.lines["validation"]:
                xs, ys = lines[-1]["times"], lines[-1]["flow_by_time"]
                color = theme.color(run.method, methods)
                ax.plot(xs, ys, color=color, marker="o", markersize=3.5, linewidth=1.6)
                ends.setdefault(run.method, End(xs[-1], ys[-1], run.method, color))
        label_ends(ax, list(ends.values()))
    return figure


def ledger_figure(
    runs: Sequence[RunResult], theme: Theme = LIGHT, *, size: tuple[float, float] = WIDE
) -> Any:
    """Where each method's FLOPs went: a bar, split into warm-up, full steps and teacher."""
    firsts = {name: group[0].last for name, group in by_method(runs).items()}
    scale, unit = flops_unit(max(line["flops_total"] for line in firsts.values()))
    height = 70.0 + 52 * len(firsts)
    with style(theme):
        figure, ax = canvas((size[0], height), title="", label=f"total cost, {unit}", top=36)
        ax.grid(False)
        for place, line in enumerate(firsts.values()):
            warm, teacher, whole = line["flops_warmup"], line["flops_teacher"], line["flops_total"]
            start = 0.0
            for part, flops, color in zip(
                PARTS, (warm, whole - warm - teacher, teacher), theme.parts, strict=True
            ):
                width, share = flops / scale, flops / whole
                name = None if place else part
                ax.barh(place, width, 0.62, start, color=color, edgecolor=theme.paper, label=name)
                if share > 0.045 * max(1, 600 / size[0]):
                    middle = start + width / 2
                    text = f"{share:.0%}"
                    ax.text(middle, place, text, ha="center", va="center", fontsize=11)
                start += width
        ax.set_yticks(range(len(firsts)), list(firsts))
        ax.tick_params(axis="y", labelcolor=theme.ink)
        ax.invert_yaxis()
        ax.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, handlelength=0.8,
            handleheight=0.8, fontsize=12, labelcolor=theme.soft, columnspacing=1.2,
        )  # fmt: skip
    return figure


def to_bytes(figure: Any, theme: Theme, ending: str) -> bytes:
    """The figure as "svg" or "png" (two pixels a point), the same bytes each time."""
    stream = io.BytesIO()
    fixed = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[ending]
    with style(theme):
        figure.savefig(stream, format=ending, dpi=144, metadata=fixed)
    return stream.getvalue()


def save_figure(
    draw: Callable[[Theme], Any], stem: str | Path, *, data: Mapping[str, Any]
) -> list[Path]:
    """Write `stem`-light and -dark as SVG and PNG, and the numbers behind them as `stem`.json."""
    stem, written = Path(stem), []
    for theme in (LIGHT, DARK):
        figure = draw(theme)
        for ending in ("svg", "png"):
            written.append(stem.with_name(f"{stem.name}-{theme.name}.{ending}"))
            write_bytes(written[-1], to_bytes(figure, theme, ending))
    written.append(stem.with_name(stem.name + ".json"))
    write_json(written[-1], dict(data))
    return written
