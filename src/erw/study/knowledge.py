"""Figures of what networks know: a value over depth, over noise time, or over training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erw.study import plots
from erw.study.plots import Theme, save_figure

NAMES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "mutual_knn": "Mutual nearest neighbours",
    "probe": "Linear probe, accuracy",
    "knn": "Nearest neighbours, accuracy",
}
AXES = {"depth": "block", "step": "training steps", "time": "noise time, 0 is clean"}
FIELDS = {"run": "{}", "step": "{:,} steps", "time": "t = {:g}", "depth": "block {}"}
Points = Sequence[Mapping[str, Any]]


class Line(NamedTuple):
    """Values over one axis; `key` is what is the same along it, in the order of `FIELDS`."""

    key: tuple[Any, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def axes_of(points: Points) -> list[str]:
    """The axes that a figure can be drawn over, the first being the main one."""
    return [axis for axis in AXES if len({p[axis] for p in points}) > 1] or ["depth"]


def lines_over(points: Points, axis: str) -> list[Line]:
    """One line for each combination of what is not the axis.

    Runs of one step each, all different, are one run's history when drawn over steps.
    """
    same = [name for name in FIELDS if name != axis]
    pairs = {(p["run"], p["step"]) for p in points}
    if axis == "step" and len(pairs) == len({r for r, _ in pairs}) == len({s for _, s in pairs}):
        same.remove("run")
    lines = []
    for key in dict.fromkeys(tuple(p[name] for name in same) for p in points):
        along = [p for p in points if tuple(p[name] for name in same) == key]
        along.sort(key=lambda p: p[axis])
        xs, ys = (tuple(p[name] for p in along) for name in (axis, "value"))
        lines.append(Line(key if "run" in same else ("", *key), xs, ys))
    return lines


def history(points: Points) -> list[dict[str, Any]]:
    """How the values of each run, time and depth went over steps, where there are three or more.

    First, lowest and last value, and the step of the lowest. `u_shaped`: the lowest lies strictly
    between, and at least a tenth of the fall comes back.
    """
    lines = []
    for line in lines_over(points, "step"):
        if len(line.xs) < 3:
            continue
        first, low, last = line.ys[0], min(line.ys), line.ys[-1]
        i = line.ys.index(low)
        u_shaped = 0 < i < len(line.ys) - 1 and last - low >= 0.1 * (first - low)
        where = dict(zip(("run", "time", "depth"), line.key, strict=True))
        change = {"first": first, "lowest": low, "last": last, "step": int(line.xs[i])}
        lines.append(where | change | {"u_shaped": u_shaped})
    return lines


def knowledge_figure(record: Mapping[str, Any], theme: Theme, *, over: str = "depth") -> Any:
    """The values of `erw analyze` over an axis of `AXES`, a line for each of what else differs."""
    lines = lines_over(record["points"], over)
    names = _names(lines, [name for name in FIELDS if name != over])
    drawn = [
        plots.Line(name, theme.spare[i % len(theme.spare)], line.xs, line.ys)
        for i, (line, name) in enumerate(zip(lines, names, strict=True))
    ]
    title, level = NAMES[record["metric"]], None
    if record["reference"] is not None:
        title += f" with {record['encoder']}"
        level = (f"{record['encoder']} itself", record["reference"])
    return plots.lines_figure(drawn, theme, title=title, label=AXES[over], level=level)


def save_knowledge(record: Mapping[str, Any], stem: str | Path) -> list[Path]:
    """Every figure that the values allow, each with its JSON: STEM, and STEM-step or STEM-time."""
    stem, written = Path(stem), []
    for i, axis in enumerate(axes_of(record["points"])):
        path = stem if i == 0 else stem.with_name(f"{stem.name}-{axis}")
        written += save_figure(
            lambda theme, axis=axis: knowledge_figure(record, theme, over=axis),  # type: ignore[misc]
            path,
            data=record,
        )
    return written


def _names(lines: Sequence[Line], fields: Sequence[str]) -> list[str]:
    """What tells the lines apart, and nothing else."""
    differ = [i for i in range(len(fields)) if len({line.key[i] for line in lines}) > 1]
    return [
        ", ".join(FIELDS[fields[i]].format(line.key[i]) for i in differ) or str(line.key[0])
        for line in lines
    ]
