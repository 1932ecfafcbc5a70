"""Figures of what networks know: a value over depth, over noise time, or over training steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from erw.study.plots import Line, Theme, lines_figure, save_figure

NAMES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "probe": "Linear probe, accuracy",
    "knn": "Nearest neighbours, accuracy",
}
AXES = {"depth": "block", "step": "training steps", "time": "noise time, 0 is clean"}
FIELDS = {"run": "{}", "step": "{:,} steps", "time": "t = {:g}", "depth": "block {}"}


def knowledge_figure(record: Mapping[str, Any], axis: str, theme: Theme) -> Any:
    """The values of `erw analyze` over one of `AXES`: a line for each combination of the rest."""
    points, encoder = record["points"], record["encoder"]
    title, level = NAMES[record["metric"]], None
    if record["reference"] is not None:
        title += f" with {encoder}"
        level = (f"{encoder} itself", record["reference"])
    # What tells the lines apart, and nothing else.
    differ = [f for f in FIELDS if f != axis and len({p[f] for p in points}) > 1] or ["run"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        name = ", ".join(FIELDS[field].format(p[field]) for field in differ)
        lines.setdefault(name, []).append((p[axis], p["value"]))
    drawn = [
        Line(name, theme.spare[i % len(theme.spare)], *zip(*sorted(some), strict=True))
        for i, (name, some) in enumerate(lines.items())
    ]
    return lines_figure(drawn, theme, title=title, label=AXES[axis], level=level)


def save_knowledge(record: Mapping[str, Any], stem: str | Path) -> list[Path]:
    """A figure over each axis along which the values of `erw analyze` differ, with its JSON: STEM,
    and STEM-step or STEM-time."""
    axes = [axis for axis in AXES if len({p[axis] for p in record["points"]}) > 1] or ["depth"]
    return [
        path
        for axis in axes
        for path in save_figure(
            partial(knowledge_figure, record, axis),
            stem if axis == axes[0] else f"{stem}-{axis}",
            data=record,
        )
    ]
