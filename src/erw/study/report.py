"""`erw report`: one self-contained HTML page of training runs, or of a study's runs."""

import base64
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from erw.config import flat, from_dict
from erw.data.sources.openmoji import ATTRIBUTION
from erw.errors import DataError
from erw.io import write_text
from erw.study import plots
from erw.study.compare import amount, label_of, speed_ups
from erw.study.outcome import cells, lines_of, verdict
from erw.study.plots import DARK, HALF, LIGHT, WIDE
from erw.study.results import RunResult, by_method, read_runs, read_study
from erw.study.studies import Study

NARROW = (358.0, 300.0)
PREVIEWS, SAMPLES = 4, 36  # pictures of a method at most
REFERENCE = "reference.png"


def report(paths: Sequence[str | Path], *, out: str | Path) -> Path:
    """Write the page of the runs in `paths` (folders of runs, or of a study) to `out`.

    Raises FileNotFoundError, DataError or CheckpointError, naming the file, if a run is missing or
    damaged.
    """
    import jinja2

    if not paths:
        raise DataError("no run to report on; name the folders of training runs, or of a study")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("erw", "study"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"label": label_of, "flat": flat, "flops": amount}
    page = environment.get_template("report.html.j2")
    write_text(Path(out), page.render(content(read_runs(paths), Path(paths[0]))))
    return Path(out)


def content(runs: Sequence[RunResult], base: Path) -> dict[str, Any]:
    """What the template shows. `base`: the folder of the study, if it is one."""
    record, groups, reference = read_study(base), by_method(runs), base / REFERENCE
    study = record.get("study", {})
    table = from_dict(Study, study) if "rows" in study else None
    judged = table is not None and (bool(table.claim) or len(groups) > 4)
    if table:
        study = {**study, "samples": runs[0].recipe["run"]["eval"]["samples"]}
    metrics = [m for m in runs[0].names("values") if all(m in r.names("values") for r in runs)]
    waiting = [name for name, group in groups.items() if not all(run.finished for run in group)]
    curves = {
        m: {name: [run.curve("values", m) for run in group] for name, group in groups.items()}
        for m in metrics
    }
    main = {
        name: some for m in metrics[:1] for name, some in curves[m].items() if name not in waiting
    }
    main = {} if judged else main  # the verdict stands there instead
    losses = {name for run in runs for name in run.names("losses")}
    emoji = any(run.recipe["cache"]["vae"].startswith("openmoji") for run in runs)
    return {
        "themes": [LIGHT, DARK],
        "study": study,
        "table": table,
        "cells": cells(lines := lines_of(table, base)) if table else [],
        "verdict": verdict(table, lines) if table and judged else "",
        "environment": flat({name: record.get(name, {}) for name in ("versions", "hardware")}),
        "groups": groups,
        "metrics": metrics,
        "ends": {
            m: {name: [curve.values[-1] for curve in some] for name, some in curves[m].items()}
            for m in metrics
        },
        "waiting": waiting,
        "speed_ups": speed_ups(main, metric=metrics[0]) if metrics else {},
        "losses": sorted(losses, key=lambda name: (name != "flow", name)),
        "wide": WIDE,
        "score": partial(_figure, plots.score_figure, runs),
        "curve": partial(_figure, plots.curve_figure, runs),
        "times": partial(_figure, plots.times_figure, runs),
        "pictures": {name: _pictures(group[0].path) for name, group in groups.items()},
        "reference": _png(reference) if reference.is_file() else "",
        "attribution": f"Images: {ATTRIBUTION}." if emoji else "",
    }


def _figure(
    draw: Callable[..., Any], *args: Any, size: tuple[float, float] = HALF, **options: Any
) -> list[tuple[str, str]]:
    """A figure for both themes and for wide and narrow pages: CSS classes and data addresses."""
    images = []
    for theme, (width, points) in product((LIGHT, DARK), (("wide", size), ("narrow", NARROW))):
        figure = draw(*args, theme=theme, size=points, **options)
        data = _uri("svg+xml", plots.to_bytes(figure, theme, "svg"))
        images.append((f"{theme.name} {width}", data))
    return images


def _pictures(run: Path) -> list[tuple[str, int]]:
    """At most four previews evenly over time, the last among them, with their steps; or samples."""
    if not (paths := sorted(run.glob("previews/*.png"))):
        return [(_png(path), 0) for path in sorted(run.glob("samples/**/*.png"))[:SAMPLES]]
    count = min(PREVIEWS, len(paths))
    some = [paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)]
    return [(_png(path), int(path.stem.rpartition("-")[2])) for path in some]


def _png(path: Path) -> str:
    """A PNG file as a data address. Raises DataError for a file cut short."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG") or b"IEND" not in data[-16:]:
        raise DataError(f"{path} is no complete PNG; delete it and run the same command again")
    return _uri("png", data)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
