"""Figures of what networks know: a value over depth, over noise time, or over training steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erw.errors import ConfigError
from erw.evaluation.probing import over_steps
from erw.study import marks
from erw.study.plots import save_figure
from erw.study.style import Theme

NAMES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "mutual_knn": "Mutual nearest neighbours",
    "probe": "Linear probe, accuracy",
    "knn": "Nearest neighbours, accuracy",
    "spatial": "Spatial structure (local less distant similarity)",
}
AGAINST = ("cknna", "cka", "mutual_knn")
AXES = {"depth": "block", "step": "training steps", "time": "noise time, 0 is clean"}
FIELDS = ("run", "step", "time", "depth")
LABELLED = 9  # names beside lines that fit under each other


class Line(NamedTuple):
    """Values over one axis; `key` is what is the same along it, in the order of `FIELDS`."""

    key: tuple[Any, ...]
    xs: tuple[float, ...]
    ys: tuple[float, ...]


def axes_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes that a figure can be drawn over, the first being the main one."""
    return [axis for axis in AXES if len({p[axis] for p in points}) > 1] or ["depth"]


def lines_over(points: Sequence[Mapping[str, Any]], axis: str) -> list[Line]:
    """One line for each combination of what is not the axis.

    Runs of one step each, all different, are one run's history when drawn over steps.
    """
    same = [name for name in FIELDS if name != axis]
    steps = {
        run: {p["step"] for p in points if p["run"] == run} for run in {p["run"] for p in points}
    }
    alone = all(len(found) == 1 for found in steps.values())
    if axis == "step" and alone and len(set().union(*steps.values())) == len(steps):
        same.remove("run")
    keys = dict.fromkeys(tuple(p[name] for name in same) for p in points)
    found = []
    for key in keys:
        along = [p for p in points if tuple(p[name] for name in same) == key]
        along.sort(key=lambda p: p[axis])
        full = key if "run" in same else ("", *key)
        xs, ys = (tuple(p[name] for p in along) for name in (axis, "value"))
        found.append(Line(full, xs, ys))
    return found


def history(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How the values of each run, time and depth went over steps, where there are three or more."""
    found = []
    for line in lines_over(points, "step"):
        if change := over_steps(line.xs, line.ys):
            keys = zip(("run", "time", "depth"), line.key, strict=True)
            found.append(dict(keys) | change._asdict())
    return found


def knowledge_figure(
    record: Mapping[str, Any],
    theme: Theme,
    *,
    over: str = "depth",
    size: tuple[float, float] = (800, 400),
) -> Any:
    """The values of `erw analyze` over an axis of `AXES`, a line for each of what else differs."""
    points = record["points"]
    if not points:
        raise ConfigError("nothing was measured: no runs, times or depths")
    lines = lines_over(points, over)
    names = _names(lines, [name for name in FIELDS if name != over])
    title = NAMES[record["metric"]]
    if record["metric"] in AGAINST:
        title += f" with {record['encoder']}"
    with marks.drawing(theme):
        room = marks.room_for(names)
        figure, ax = marks.canvas(size, title=title, label=AXES[over], right=room)
        if over == "depth":
            ax.xaxis.get_major_locator().set_params(integer=True)
        elif over == "step":
            ax.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        said = _spaced(len(lines), LABELLED)
        ends = []
        for i, (line, color) in enumerate(zip(lines, _colors(lines, theme), strict=True)):
            ax.plot(line.xs, line.ys, color=color, marker="o", markersize=4, linewidth=2)
            if i in said:
                ends.append(marks.End(line.xs[-1], line.ys[-1], names[i], color))
        if record["reference"] is not None:
            ax.axhline(record["reference"], color=theme.soft, linewidth=1.2, linestyle=(0, (4, 3)))
            at = ((0, record["reference"]), (4, 4))
            within = ("axes fraction", "data")
            marks.write(ax, f"{record['encoder']} itself", *at, within=within, color=theme.soft)
        marks.label_ends(figure, ax, ends)
    return figure


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
    differ = [len({line.key[i] for line in lines}) > 1 for i in range(len(fields))]
    words = {"run": "{}", "step": "{:,} steps", "time": "t = {:g}", "depth": "block {}"}
    told = [
        ", ".join(
            words[name].format(value)
            for name, value, said in zip(fields, line.key, differ, strict=True)
            if said
        )
        for line in lines
    ]
    return [name or str(line.key[0]) for name, line in zip(told, lines, strict=True)]


def _colors(lines: Sequence[Line], theme: Theme) -> Iterator[str]:
    """A colour for each run; for many lines of one run a ramp, from the first to the last."""
    runs = list(dict.fromkeys(line.key[0] for line in lines))
    if len(lines) <= len(theme.spare):
        yield from theme.spare[: len(lines)]
        return
    for line in lines:
        mine = [other for other in lines if other.key[0] == line.key[0]]
        part = mine.index(line) / max(1, len(mine) - 1)
        if len(runs) == 1:
            yield _mix(theme.series["repa"], theme.series["erw"], part)
        else:
            color = theme.spare[runs.index(line.key[0]) % len(theme.spare)]
            yield _mix(theme.line, color, 0.5 + 0.5 * part)


def _mix(low: str, high: str, part: float) -> str:
    """The colour between two, as #rrggbb."""
    a, b = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (low, high))
    mixed = [round(x + part * (y - x)) for x, y in zip(a, b, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _spaced(count: int, most: int) -> set[int]:
    """At most `most` of so many places, evenly, first and last among them."""
    if count <= most:
        return set(range(count))
    return {math.floor(i * (count - 1) / (most - 1) + 0.5) for i in range(most)}
