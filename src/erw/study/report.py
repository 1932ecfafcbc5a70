"""`erw report`: one self-contained HTML page of training runs, or of a study's runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from erw.data.sources.openmoji import ATTRIBUTION
from erw.errors import DataError
from erw.io import write_text
from erw.study import plots
from erw.study.compare import amount, label_of, score_curves, speed_up, verdict
from erw.study.plots import DARK, HALF, LIGHT, WIDE
from erw.study.results import STUDY, RunResult, by_method, read_runs
from erw.training.run_dir import flat

NARROW = (358.0, 300.0)
AXES = {"flops": "Compute", "seconds": "Time", "steps": "Steps"}
PREVIEWS, SAMPLES = 4, 36  # pictures of a method at most
REFERENCE = "reference.png"
Draw = Callable[..., Any]


class Picture(NamedTuple):
    """A PNG inside the page, with what it shows, a score and a line below it."""

    uri: str
    alt: str
    score: float | None = None
    caption: str = ""


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
    environment.filters |= {
        "number": number,
        "duration": duration,
        "label": label_of,
        "flat": flat,
    }
    environment.filters["flops"] = partial(amount, over="flops")
    page = environment.get_template("report.html.j2").render(content(runs, Path(paths[0])))
    write_text(Path(out), page)
    return Path(out)


def content(runs: Sequence[RunResult], base: Path) -> dict[str, Any]:
    """What the template shows. `base`: the folder of the study, if it is one."""
    record = json.loads((base / STUDY).read_text()) if (base / STUDY).is_file() else {}
    groups = by_method(runs)
    metrics = [name for name in runs[0].names("values")
               if all(name in run.names("values") for run in runs)]  # fmt: skip
    ends = {
        metric: {name: [c.values[-1] for c in score_curves(group, metric)]
                 for name, group in groups.items()}
        for metric in metrics
    }  # fmt: skip
    names = {name for run in runs for name in run.names("losses")}
    losses = sorted(names, key=lambda name: (name != "flow", name))
    validated = any(run.lines["validation"] for run in runs)
    return {
        "themes": [LIGHT, DARK],
        "study": record.get("study", {}),
        "environment": flat({name: record.get(name, {}) for name in ("versions", "hardware")}),
        "groups": groups,
        "tints": {name: _tint(name, list(groups)) for name in groups},
        "metrics": metrics,
        "ends": ends,
        "ratios": _ratios(runs, metrics[0]) if metrics else {},
        "verdict": verdict(runs, metrics[0]) if metrics and record else [],
        "scores": [_score(runs, metrics[0], "flops", WIDE)] if metrics else [],
        "more_scores": [
            *(_score(runs, name, over) for name in metrics[:1] for over in ("seconds", "steps")),
            *(_score(runs, name, "flops") for name in metrics[1:]),
        ],
        "pictures": {name: _pictures(group[0], len(groups) > 1) for name, group in groups.items()},
        "reference": _png(base / REFERENCE) if (base / REFERENCE).is_file() else "",
        "training": [
            (over, word, [_curve(runs, "losses", name, over) for name in losses])
            for over, word in AXES.items()
        ],
        "validation": [
            _curve(runs, "validation", "flow", "flops"),
            _figure(partial(plots.times_figure, runs), HALF),
        ]
        if validated
        else [],
        "settings": {name: flat(group[0].recipe["run"]) for name, group in groups.items()},
        "attribution": f"Images: {ATTRIBUTION}."
        if any(run.recipe["cache"]["vae"].startswith("openmoji") for run in runs)
        else "",
    }


def _ratios(runs: Sequence[RunResult], metric: str) -> dict[str, Any]:
    """How each method but the first compares with the first; None while one is under way."""
    groups = by_method(runs)
    curves = {name: score_curves(group, metric) for name, group in groups.items()}
    first, *others = groups
    return {
        name: speed_up(curves[name], curves[first], metric=metric)
        if all(run.finished for run in (*groups[name], *groups[first]))
        else None
        for name in others
    }


def _score(
    runs: Sequence[RunResult], metric: str, over: str, size: tuple[float, float] = HALF
) -> list[tuple[str, str]]:
    return _figure(partial(plots.score_figure, runs, metric, over=over), size)


def _curve(runs: Sequence[RunResult], group: str, name: str, over: str) -> list[tuple[str, str]]:
    return _figure(partial(plots.curve_figure, runs, group, name, over=over), HALF)


def _figure(draw: Draw, size: tuple[float, float]) -> list[tuple[str, str]]:
    """A figure for both themes and for wide and narrow pages: CSS classes and data addresses."""
    return [
        (f"{theme.name} {width}", _uri("svg+xml", plots.to_bytes(figure, theme, "svg")))
        for theme in (LIGHT, DARK)
        for width, points in (("wide", size), ("narrow", NARROW))
        for figure in (draw(theme=theme, size=points),)
    ]


def _pictures(run: RunResult, compared: bool) -> list[Picture]:
    """At most four previews, evenly over time, the last among them; or else the run's samples."""
    paths = sorted(run.path.glob("previews/*.png"))
    if not paths:
        samples = sorted(run.path.glob("samples/**/*.png"))[:SAMPLES]
        return [Picture(_png(path), path.stem) for path in samples]
    count, pictures = min(PREVIEWS, len(paths)), []
    for path in (paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)):
        step = int(path.stem.rpartition("-")[2])
        line = next((line for line in run.lines["eval"] if line["step"] == step), None)
        score = next(iter(line["values"].values())) if line else None
        share = line["flops_total"] / run.last["flops_total"] if line else 0
        caption = f"{share:.0%} of the compute" if line and compared else f"step {step:,}"
        pictures.append(Picture(_png(path), f"{run.method}, {caption}", score, caption))
    return pictures


def _tint(name: str, methods: list[str]) -> str:
    """The CSS variable of a method's colour."""
    color = LIGHT.color(name, methods)
    return f"var(--{name})" if name in LIGHT.series else f"var(--spare-{LIGHT.spare.index(color)})"


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


def number(value: float) -> str:
    """Four digits: "483.0", "0.4830"."""
    return f"{value:#.4g}".rstrip(".")
