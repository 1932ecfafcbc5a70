"""Figures of what networks know: a value over depth, over noise time, or over training steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erw.io import write_bytes, write_json
from erw.study.plots import DARK, LIGHT, Line, lines_figure, to_bytes

NAMES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "probe": "Linear probe, accuracy",
    "knn": "Nearest neighbours, accuracy",
}
AXES = {"depth": "block", "step": "training steps", "time": "noise time, 0 is clean"}
FIELDS = {"run": "{}", "step": "{:,} steps", "time": "t = {:g}", "depth": "block {}"}
Points = Sequence[Mapping[str, Any]]


def axes_of(points: Points) -> list[str]:
    """The axes that a figure can be drawn over, the first being the main one."""
    return [axis for axis in AXES if len({p[axis] for p in points}) > 1] or ["depth"]


def lines_over(points: Points, axis: str) -> dict[tuple[Any, ...], list[tuple[float, float]]]:
    """The (x, value) of each combination of the `FIELDS` that are not the axis, by their values.

    Runs of one step each, all different, are one run's history when drawn over steps.
    """
    pairs = {(p["run"], p["step"]) for p in points}
    one = axis == "step" and len(pairs) == len({r for r, _ in pairs}) == len({s for _, s in pairs})
    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for p in sorted(points, key=lambda p: p[axis]):
        key = tuple("" if one and name == "run" else p[name] for name in FIELDS if name != axis)
        lines.setdefault(key, []).append((p[axis], p["value"]))
    return lines


def history(points: Points) -> list[dict[str, Any]]:
    """How the values of each run, time and depth went over steps, where there are three or more.

    First, lowest and last value, and the step of the lowest. `u_shaped`: the lowest lies strictly
    between, and at least a tenth of the fall comes back.
    """
    changes = []
    for (run, time, depth), line in lines_over(points, "step").items():
        first, last = line[0][1], line[-1][1]
        step, low = min(line, key=lambda point: point[1])
        bent = line[0][0] < step < line[-1][0] and last - low >= 0.1 * (first - low)
        change = {"first": first, "lowest": low, "last": last, "step": int(step), "run": run}
        changes += [change | {"time": time, "depth": depth, "u_shaped": bent}] * (len(line) > 2)
    return changes


def save_knowledge(
    record: Mapping[str, Any], stem: str | Path, *, axes: Sequence[str] = ()
) -> list[Path]:
    """A figure of the values of `erw analyze` over each of `axes`, or along which they differ, with
    its JSON: STEM, and STEM-step or STEM-time; light and dark, as SVG and PNG."""
    stem, written = Path(stem), list[Path]()
    title, level = NAMES[record["metric"]], None
    if record["reference"] is not None:
        title += f" with {record['encoder']}"
        level = (f"{record['encoder']} itself", record["reference"])
    for i, axis in enumerate(axes or axes_of(record["points"])):
        lines = lines_over(record["points"], axis)
        texts = [text for name, text in FIELDS.items() if name != axis]
        # What tells the lines apart, and nothing else.
        differ = [j for j, values in enumerate(zip(*lines, strict=True)) if len({*values}) > 1]
        drawn = []
        for key, line in lines.items():
            name = ", ".join(texts[j].format(key[j]) for j in differ) or str(key[0])
            drawn.append(Line(name, [x for x, _ in line], [y for _, y in line]))
        name = f"{stem.name}-{axis}" if i else stem.name
        for theme in (LIGHT, DARK):
            figure = lines_figure(drawn, theme, title=title, label=AXES[axis], level=level)
            for ending in ("svg", "png"):
                written.append(stem.with_name(f"{name}-{theme.name}.{ending}"))
                write_bytes(written[-1], to_bytes(figure, theme, ending))
        written.append(stem.with_name(f"{name}.json"))
        write_json(written[-1], dict(record))
    return written
