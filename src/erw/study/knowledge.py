"""Figures of what networks know: a value over depth, over noise time, or over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erw.study.plots import Line, Theme, lines_figure, save_figure

NAMES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "probe": "Linear probe, accuracy",
    "knn": "Nearest neighbours, accuracy",
}
AXES = {"depth": "block", "step": "training steps", "time": "noise time, 0 is clean"}
FIELDS = {"run": "{}", "step": "{:,} steps", "time": "t = {:g}", "depth": "block {}"}
Points = Sequence[Mapping[str, Any]]


class Series(NamedTuple):
    """Values over one axis; `key` is what is the same along it, in the order of `FIELDS`."""

    key: tuple[Any, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def axes_of(points: Points) -> list[str]:
    """The axes that a figure can be drawn over, the first being the main one."""
    return [axis for axis in AXES if len({p[axis] for p in points}) > 1] or ["depth"]


def lines_over(points: Points, axis: str) -> list[Series]:
    """One line for each combination of what is not the axis.

    Runs of one step each, all different, are one run's history when drawn over steps.
    """
    pairs = {(p["run"], p["step"]) for p in points}
    one = axis == "step" and len(pairs) == len({r for r, _ in pairs}) == len({s for _, s in pairs})
    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for p in points:
        key = tuple("" if one and name == "run" else p[name] for name in FIELDS if name != axis)
        lines.setdefault(key, []).append((p[axis], p["value"]))
    return [Series(key, *zip(*sorted(some), strict=True)) for key, some in lines.items()]


def history(points: Points) -> list[dict[str, Any]]:
    """How the values of each run, time and depth went over steps, where there are three or more.

    First, lowest and last value, and the step of the lowest. `u_shaped`: the lowest lies strictly
    between, and at least a tenth of the fall comes back.
    """
    lines = []
    for line in lines_over(points, "step"):
        if len(line.xs) > 2:
            first, low, last = line.ys[0], min(line.ys), line.ys[-1]
            i = line.ys.index(low)
            u_shaped = 0 < i < len(line.ys) - 1 and last - low >= 0.1 * (first - low)
            change = {"first": first, "lowest": low, "last": last, "step": int(line.xs[i])}
            change |= zip(("run", "time", "depth"), line.key, strict=True)
            lines.append(change | {"u_shaped": u_shaped})
    return lines


def save_knowledge(record: Mapping[str, Any], stem: str | Path) -> list[Path]:
    """A figure of the values of `erw analyze` over each axis along which they differ, with its
    JSON: STEM, and STEM-step or STEM-time."""
    stem, written = Path(stem), []
    title, level = NAMES[record["metric"]], None
    if record["reference"] is not None:
        title += f" with {record['encoder']}"
        level = (f"{record['encoder']} itself", record["reference"])
    for i, axis in enumerate(axes_of(record["points"])):
        lines = lines_over(record["points"], axis)
        fields = [text for name, text in FIELDS.items() if name != axis]
        # What tells the lines apart, and nothing else.
        differ = [j for j in range(len(fields)) if len({line.key[j] for line in lines}) > 1]
        names = [
            ", ".join(fields[j].format(line.key[j]) for j in differ) or str(line.key[0])
            for line in lines
        ]

        def draw(theme: Theme, lines: Any = lines, names: Any = names, axis: str = axis) -> Any:
            drawn = [
                Line(name, theme.spare[j % len(theme.spare)], line.xs, line.ys)
                for j, (name, line) in enumerate(zip(names, lines, strict=True))
            ]
            return lines_figure(drawn, theme, title=title, label=AXES[axis], level=level)

        path = stem.with_name(f"{stem.name}-{axis}") if i else stem
        written += save_figure(draw, path, data=record)
    return written
