"""`erw report`: one self-contained HTML page of training runs, or of a study's runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erw.data.sources.openmoji import ATTRIBUTION
from erw.errors import DataError
from erw.io import write_text
from erw.study import plots
from erw.study.compare import (
    Reach,
    amount,
    by_method,
    label_of,
    mean_curve,
    score_curves,
    speed_up,
    times,
    verdict,
)
from erw.study.plots import DARK, LIGHT, Theme
from erw.study.results import STUDY, RunResult, read_runs
from erw.training.run_dir import flat

WIDE, HALF, NARROW = (1056.0, 430.0), (520.0, 320.0), (358.0, 300.0)
AXES = {"flops": "Compute", "seconds": "Time", "steps": "Steps"}
COLUMNS = 4
STRIP = 36
REFERENCE = "reference.png"


class Picture(NamedTuple):
    """An image inside the page: its data, what it shows, and a line below it."""

    uri: str
    alt: str
    value: str = ""
    caption: str = ""


class Figure(NamedTuple):
    """A figure drawn for both themes and for a wide and a narrow page."""

    label: str
    images: list[tuple[str, str]]


def report(paths: Sequence[str | Path], *, out: str | Path) -> Path:
    """Write the page of the runs in `paths` (folders of runs, or of a study) to `out`.

    Raises FileNotFoundError, DataError or CheckpointError, naming the file, if a run is missing or
    damaged.
    """
    import jinja2

    if not paths:
        raise DataError("no run to report on; name the folders of training runs, or of a study")
    runs = read_runs(paths)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("erw", "study"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(content(runs, Path(paths[0])))
    write_text(Path(out), page)
    return Path(out)


def content(runs: Sequence[RunResult], base: Path) -> dict[str, Any]:
    """Everything that the template shows. `base`: the study's folder, if it is one."""
    record = json.loads((base / STUDY).read_text()) if (base / STUDY).is_file() else {}
    study = record.get("study", {})
    groups = by_method(runs)
    metrics = list(dict.fromkeys(name for run in runs for name in run.names("values")))
    compared = [name for name in metrics if all(name in run.names("values") for run in runs)]
    if study.get("small"):
        lines = ["It works", "Tiny networks, a few steps: nothing here compares methods."]
    elif compared and len(groups) > 1:
        lines = verdict(runs, compared[0])
    else:
        title = runs[0].method if len(groups) == 1 else f"{len(groups)} training runs"
        lines = [title, *(_progress(run) for run in runs)]
    built_in = any(run.recipe["cache"]["vae"].startswith("openmoji") for run in runs)
    return {
        "themes": [LIGHT, DARK],
        "kind": study.get("title", "Training run" if len(runs) == 1 else "Training runs"),
        "title": lines[0],
        "leads": lines[1:],
        "tiles": _tiles(runs, compared[0]) if compared else [],
        "scores": _scores(runs, compared),
        "samples": _samples(runs, base),
        "training": _training(runs),
        "validation": _validation(runs),
        "ledger": _figure(lambda theme, size: plots.ledger_figure(runs, theme, size=size), "cost"),
        "warmup": any(run.warmup for run in runs),
        "seeds": max(len(group) for group in groups.values()),
        "costs": _costs(runs, compared),
        "points": _points(runs, compared),
        "settings": {name: flat(group[0].recipe["run"]) for name, group in groups.items()},
        "made": _made(runs, record),
        "study": study,
        "attribution": f"Images: {ATTRIBUTION}." if built_in else "",
    }


def _progress(run: RunResult) -> str:
    """One sentence on a run: how far, what it cost, where the loss stands."""
    last = run.last
    share = last["flops_warmup"] / max(last["flops_total"], 1)
    warm = f", {share:.0%} of the compute in warm-up" if share else ""
    losses = ", ".join(f"{name} {value:.3f}" for name, value in last["losses"].items())
    return (
        f"{run.path.resolve().name}: step {last['step']:,}, "
        f"{amount(last['flops_total'], 'flops')}, {duration(last['seconds'])} of training{warm}. "
        f"The last losses: {losses}."
    )


def _tiles(runs: Sequence[RunResult], metric: str) -> list[dict[str, Any]]:
    """One tile a method: final score, its spread, what it took, and how it compares."""
    groups = by_method(runs)
    first = next(iter(groups))
    curves = {name: score_curves(group, metric) for name, group in groups.items()}
    tiles = []
    for name, group in groups.items():
        scores, last = [curve.values[-1] for curve in curves[name]], group[0].last
        gain = "the baseline" if len(groups) > 1 else ""
        if name != first:
            done = all(run.finished for run in (*group, *groups[first]))
            ratio = speed_up(curves[name], curves[first], metric=metric)
            gain = _gain(ratio, first) if done else "still under way"
        spread = f"{_number(min(scores))} to {_number(max(scores))} over {len(scores)} seeds"
        tiles.append(
            {
                "name": name,
                "tint": _tint(name, list(groups)),
                "score": _number(mean_curve(curves[name]).values[-1]),
                "spread": spread if len(scores) > 1 else "",
                "gain": gain,
                "cost": f"{last['step']:,} steps · {amount(last['flops_total'], 'flops')} · "
                f"{_time(group)}",
            }
        )
    return tiles


def _gain(ratio: Reach, first: str) -> str:
    if ratio.value is None:
        return f"{first}’s final score not reached"
    return f"{first}’s final score at {times(ratio).replace('at most', '≤')} the compute"


def _costs(runs: Sequence[RunResult], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """What each method cost and ended with, a column a method."""
    groups = by_method(runs)
    rows = [["Seeds", *(str(len(group)) for group in groups.values())]]
    for metric in metrics:
        ends = [[c.values[-1] for c in score_curves(g, metric)] for g in groups.values()]
        means = [_number(sum(end) / len(end)) for end in ends]
        rows.append([f"Final {label_of(metric)}", *means])
        if max(map(len, ends)) > 1:
            rows.append(
                ["lowest to highest", *(f"{_number(min(e))} to {_number(max(e))}" for e in ends)]
            )
    lasts = [group[0].last for group in groups.values()]
    rows += [
        [name.capitalize(), *(f"{line[key]:,}" for line in lasts)]
        for name, key in (("steps", "step"), ("images", "images"))
    ]
    for name, key in (
        ("FLOPs", "total"),
        ("of it warm-up", "warmup"),
        ("of it teacher", "teacher"),
    ):
        flops = [line[f"flops_{key}"] for line in lasts]
        rows.append([name, *(amount(value, "flops") if value else "–" for value in flops)])
    return ["", *groups], [*rows, ["Time", *(_time(group) for group in groups.values())]]


def _time(group: Sequence[RunResult]) -> str:
    """Seconds of training, the mean over seeds, in words."""
    return duration(sum(run.last["seconds"] for run in group) / len(group))


def _scores(runs: Sequence[RunResult], metrics: Sequence[str]) -> list[Figure]:
    """The first score over compute, large, and over time and steps; the others over compute."""

    def drawn(metric: str, over: str, size: tuple[float, float]) -> Figure:
        def draw(theme: Theme, size: tuple[float, float]) -> Any:
            return plots.score_figure(runs, metric, theme, over=over, size=size)

        return _figure(draw, f"{label_of(metric)} over {over}, a line for each method", size)

    figures = [drawn(name, over, HALF) for name in metrics[:1] for over in ("seconds", "steps")]
    figures += [drawn(name, "flops", HALF) for name in metrics[1:]]
    return [drawn(name, "flops", WIDE) for name in metrics[:1]] + figures


def _training(runs: Sequence[RunResult]) -> list[tuple[str, str, list[Figure]]]:
    """Every loss, over each cost."""
    names = dict.fromkeys(name for run in runs for name in run.names("losses"))
    return [
        (over, word, [_curve(runs, "losses", name, over) for name in names])
        for over, word in AXES.items()
    ]


def _validation(runs: Sequence[RunResult]) -> list[Figure]:
    """The flow loss of held-out images over compute, and by time."""
    if not any(run.lines["validation"] for run in runs):
        return []
    by_time = _figure(
        lambda theme, size: plots.times_figure(runs, theme, size=size), "loss by time", HALF
    )
    return [_curve(runs, "validation", "flow", "flops"), by_time]


def _curve(runs: Sequence[RunResult], group: str, name: str, over: str) -> Figure:
    def draw(theme: Theme, size: tuple[float, float]) -> Any:
        return plots.curve_figure(runs, group, name, theme, over=over, size=size)

    return _figure(draw, f"{group} {name} over {over}, a line for each run", HALF)


def _samples(runs: Sequence[RunResult], base: Path) -> list[dict[str, Any]]:
    """Of each method's first seed: its previews over time, or else the samples that it has."""
    groups, rows = by_method(runs), []
    for name, group in groups.items():
        run, tint = group[0], _tint(name, list(groups))
        if previews := sorted(run.path.glob("previews/*.png")):
            cells = [_preview(run, path, len(groups) > 1) for path in _some(previews)]
            rows.append({"name": name, "tint": tint, "cells": cells, "strip": False})
        elif paths := sorted(run.path.glob("samples/**/*.png"))[:STRIP]:
            cells = [Picture(_png(path), path.stem) for path in paths]
            rows.append({"name": name, "tint": tint, "cells": cells, "strip": True})
    if rows and (base / REFERENCE).is_file():
        good = Picture(_png(base / REFERENCE), "held-out images", "held-out images")
        tint = "var(--ink)"
        rows.append({"name": "What good looks like", "tint": tint, "cells": [good], "strip": False})
    return rows


def _preview(run: RunResult, path: Path, budget: bool) -> Picture:
    """A picture of a step, with its score and what share of the run's cost it was drawn at."""
    step = int(path.stem.rpartition("-")[2])
    line = next((line for line in run.lines["eval"] if line["step"] == step), None)
    value = f"{next(iter(line['values'].values())):.0f}" if line else ""
    share = line["flops_total"] / run.last["flops_total"] if line else 0
    caption = f"{share:.0%} of the compute" if line and budget else f"step {step:,}"
    return Picture(_png(path), f"{run.method} samples at {caption}", value, caption)


def _some(paths: Sequence[Path]) -> list[Path]:
    """At most four, evenly over them, the last among them: more would be too small."""
    count = min(COLUMNS, len(paths))
    return [paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)]


def _points(runs: Sequence[RunResult], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A row for each score of each run."""
    head = ["Method", "Seed", "Step", "FLOPs", "Time", *map(label_of, metrics)]
    return head, [
        [run.method, str(run.seed), f"{line['step']:,}", amount(line["flops_total"], "flops"),
         duration(line["seconds"]), *(_number(line["values"][name]) for name in metrics)]
        for run in runs for line in run.lines["eval"]
    ]  # fmt: skip


def _made(runs: Sequence[RunResult], record: dict[str, Any]) -> dict[str, Any]:
    """Versions and hardware, and everything that the scores depend on."""
    made = {name: runs[0].recipe[name] for name in ("erw", "torch")}
    made |= flat({name: record.get(name, {}) for name in ("versions", "hardware")})
    if lines := runs[0].lines["eval"]:
        made |= flat({"score": lines[-1].get("how", {})})
    return made


def _tint(name: str, methods: list[str]) -> str:
    """The CSS variable of a method's colour."""
    theme = LIGHT
    if name in theme.series:
        return f"var(--{name})"
    return f"var(--spare-{theme.spare.index(theme.color(name, methods))})"


def _figure(
    draw: Callable[[Theme, tuple[float, float]], Any], label: str, size: tuple[float, float] = WIDE
) -> Figure:
    images = []
    for theme in (LIGHT, DARK):
        for width, points in (("wide", size), ("narrow", NARROW)):
            svg = plots.to_bytes(draw(theme, points), theme, "svg")
            images.append((f"{theme.name} {width}", _uri("svg+xml", svg)))
    return Figure(label, images)


def _png(path: Path) -> str:
    """A PNG file as a data address. Raises DataError for a file cut short."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG") or b"IEND" not in data[-16:]:
        raise DataError(f"{path} is no complete PNG; delete it and run the same command again")
    return _uri("png", data)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def duration(seconds: float) -> str:
    """Seconds in words: "41 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: float) -> str:
    """Four digits: "483.0", "0.4830"."""
    return f"{value:#.4g}".rstrip(".")
