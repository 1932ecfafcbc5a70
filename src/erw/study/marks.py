"""What the figures are put together from: axes, labels at line ends, floors, boundaries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from erw.study import style
from erw.study.compare import finished, mean_curve, saving
from erw.study.results import Results
from erw.study.style import Theme

FLOOR_NAMES = {"vae_reconstruction": "through the VAE", "train_images": "training images"}
SHORT_NAMES = {"vae_reconstruction": "VAE", "train_images": "training images"}
PARTS = ("warm-up", "full", "projector", "teacher")


class Axis(NamedTuple):
    """A cost to draw over: key in rows and curves, divisor and words."""

    key: str
    scale: float
    label: str


def axis_for(results: Results, kind: str) -> Axis:
    """The axis `kind` ("flops", "seconds" or "step") in the unit that fits the results' range."""
    keys = {"flops": "flops_total", "seconds": "seconds", "step": "step"}
    if kind not in keys:
        raise ValueError(f"no axis {kind!r}; choose one of {', '.join(keys)}")
    key = keys[kind]
    values = [float(getattr(row, key)) for row in results.rows]
    values += [float(c[key][-1]) for c in results.curves.values() if c[key]]
    top = max(values, default=1.0)
    if kind == "flops":
        scale, unit = flops_unit(top)
        return Axis(key, scale, f"training compute, {unit}")
    if kind == "seconds":
        if top > 2.5 * 3600:
            return Axis(key, 3600.0, "training time, hours")
        return (
            Axis(key, 60.0, "training time, minutes")
            if top > 150
            else Axis(key, 1.0, "training time, s")
        )
    return (
        Axis(key, 1000.0, "steps, thousands") if top > 20_000 else Axis(key, 1.0, "training steps")
    )


def flops_unit(top: float) -> tuple[float, str]:
    """The SI unit in which `top` FLOPs is a number from 1 to 1000."""
    for scale, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if top >= scale:
            return scale, unit
    return 1e9, "GFLOP"


class End(NamedTuple):
    """A label at the end of a line."""

    x: float
    y: float
    text: str
    color: str


def drawing(theme: Theme) -> Any:
    import matplotlib

    return matplotlib.rc_context(style.settings(theme))


def canvas(
    size: tuple[float, float],
    *,
    title: str,
    label: str,
    right: float,
    top: float = 44,
    left: float = 44,
) -> tuple[Any, Any]:
    """A figure with one axes and fixed margins in points, its title at the top left."""
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    bottom = 50
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    ax = figure.add_axes(box)
    figure.text(0.0, 1 - 14 / height, title, ha="left", va="center", weight="bold")
    ax.set_xlabel(label, loc="left", labelpad=7)
    if width < 600:
        ax.locator_params(axis="both", nbins=5)
    return figure, ax


def write(
    ax: Any,
    text: str,
    at: tuple[float, float],
    shift: tuple[float, float],
    *,
    color: str,
    within: Any = "data",
    **style: Any,
) -> None:
    """Text beside the place `at`, moved by `shift` points; small unless `style` says otherwise."""
    how = {"fontsize": 11} | style
    ax.annotate(text, at, shift, xycoords=within, textcoords="offset points", color=color, **how)


def room_for(labels: Sequence[str]) -> float:
    """Points to keep free on the right for labels at line ends, in the figures' bold type."""
    return max(64.0, 16 + 7.8 * max(map(len, labels), default=0))


def seed_dots(ax: Any, results: Results, method: str, *, axis: Axis, color: str) -> None:
    for seed in results.seeds(method):
        rows = results.of(method, seed)
        xs = [getattr(row, axis.key) / axis.scale for row in rows]
        ax.plot(xs, [row.fd_lite2 for row in rows], ".", color=color, markersize=5, alpha=0.55)


def floors(ax: Any, results: Results, *, theme: Theme, short: bool) -> None:
    """Floors as reference lines where they are near; else a note at the foot with the numbers."""
    low, high = ax.get_ylim()
    low -= 0.10 * (high - low)  # room for the note
    reach = low - 0.25 * (high - low)
    far = []
    for name, value in results.floors.items():
        text = f"{(SHORT_NAMES if short else FLOOR_NAMES).get(name, name)} {value:.0f}"
        if value < reach:
            far.append(text)
            continue
        low = min(low, value - 0.05 * (high - low))
        ax.axhline(value, color=theme.soft, linewidth=1, linestyle=(0, (1, 2.5)))
        write(ax, text, (0, value), (4, 4), within=("axes fraction", "data"), color=theme.soft)
    ax.set_ylim(low, high)
    if far:
        note = ("floors: " if short else "floors, far below: ") + ", ".join(far)
        write(ax, note, (0, 0), (4, 5), within="axes fraction", color=theme.soft)


def saving_arrow(ax: Any, results: Results, *, axis: Axis, theme: Theme, short: bool) -> None:
    """A bracket from the baseline's last point to where ERW had the same score."""
    if not {"sit", "erw"} <= set(finished(results)[0]):
        return
    item, last = saving(results, "erw", "sit"), mean_curve(results, "sit")[-1]
    if item.ratio is None:
        return
    left, right = item.ratio * last.x / axis.scale, last.x / axis.scale
    color = theme.color("erw")
    head = "-|>,head_width=0.25,head_length=0.5"
    arrow = {"arrowstyle": head, "color": color, "linewidth": 1.4, "linestyle": (0, (1, 2))}
    arrow |= {"shrinkA": 9, "shrinkB": 0}
    ax.annotate("", (left, last.mean), (right, last.mean), arrowprops=arrow)
    text = f"{'≤ ' if item.at_most else ''}{item.ratio:.2f}×{'' if short else ' the compute'}"
    at, strong = ((left + right) / 2, last.mean), {"weight": "bold", "fontsize": 12, "ha": "center"}
    write(ax, text, at, (0, 7), color=color, **strong)


def boundary(
    ax: Any, curve: Mapping[str, Any], *, axis: Axis, theme: Theme, color: str, said: bool
) -> None:
    """A vertical line where warm-up ends, with its name once a method."""
    warm = [x for x, is_warm in zip(curve[axis.key], curve["warmup"], strict=True) if is_warm]
    if not warm or said:
        return
    x = warm[-1] / axis.scale
    ax.axvspan(0, x, color=color, alpha=0.07, linewidth=0)
    ax.axvline(x, color=color, linewidth=1.2, linestyle=(0, (4, 3)))
    within = ("data", "axes fraction")
    write(ax, "warm-up ends", (x, 1), (5, -11), within=within, color=theme.soft)


def trim(ax: Any, values: Sequence[float]) -> None:
    """Leave out the first fall of a loss, which would flatten all that follows."""
    if len(values) < 20:
        return
    ordered = sorted(values)
    low, high = ordered[0], ordered[math.floor(0.97 * (len(ordered) - 1))]
    if high > low:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))


def label_ends(figure: Any, ax: Any, ends: Sequence[End], *, gap: float = 16.0) -> None:
    """Names beside the lines' ends, at least `gap` points apart vertically."""
    placed: list[tuple[float, End]] = []
    for end in sorted(ends, key=lambda end: end.y):
        y = float(ax.transData.transform((end.x, end.y))[1])
        placed.append((y, end))
    heights = spread([y for y, _ in placed], gap=gap)
    for (y, end), at in zip(placed, heights, strict=True):
        strong = {"weight": "bold", "fontsize": 13, "va": "center", "annotation_clip": False}
        write(ax, end.text, (end.x, end.y), (9, at - y), color=end.color, **strong)


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Rising heights moved so that neighbours are `gap` apart; a moved group keeps its mean."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def keys(figure: Any, ax: Any, *, theme: Theme) -> None:
    """What the colours of the ledger mean, in a line over it."""
    x = 0.0
    for color, part in zip(theme.parts, PARTS, strict=True):
        square = {"within": "axes fraction", "fontsize": 13}
        write(ax, "■", (0, 1), (x, 14), color=color, **square)
        write(ax, part, (0, 1), (x + 15, 14), within="axes fraction", color=theme.soft, fontsize=12)
        x += 15 + 6.6 * len(part) + 14
