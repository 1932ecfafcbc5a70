"""`erw report`: one self-contained HTML page of a study, or of one or more training runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from erw.data.sources.openmoji import ATTRIBUTION
from erw.errors import DataError
from erw.log import read_metrics as log_lines
from erw.study import page, sections
from erw.study.compare import Verdict, verdict
from erw.study.merge import merge
from erw.study.plots import target_figure
from erw.study.results import (
    Results,
    curve_from,
    is_warmup,
    read_json,
    read_metrics,
)
from erw.study.style import Theme
from erw.study.target import Track

PICTURES_AT_MOST = 36


class RunFolder(NamedTuple):
    """A training run's folder as the report shows it."""

    name: str
    path: Path
    metrics: tuple[dict, ...]
    recipe: dict
    pictures: tuple[Path, ...]


def report(paths: Sequence[str | Path], *, out: str | Path) -> Path:
    """Write the page for a study (folder or results.json), or for training runs, to `out`.

    Several studies are one if they differ in their seeds alone.

    Raises FileNotFoundError or DataError, naming the file, if results or metrics are missing or
    damaged.
    """
    if not paths:
        raise DataError("no run to report on; name a study folder or the folders of training runs")
    found = [Path(path) for path in paths]
    for path in found:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; name a study folder or a training run's folder"
            )
    studies = [path for path in found if path.is_file() or (path / "results.json").is_file()]
    if studies and len(studies) < len(found):
        raise DataError(f"{studies[0]} is a study: report on studies alone, or on training runs")
    if not studies and len({path.resolve() for path in found}) < len(found):
        raise DataError(f"a run is named twice: {', '.join(map(str, found))}")
    if studies:
        base = studies[0].parent if studies[0].is_file() else studies[0]
        html = study_page(merge(studies, base=base), base=base)
    else:
        html = runs_page([read_run(path) for path in found])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def study_page(results: Results, *, base: Path) -> str:
    """The page of a study; pictures are read relative to `base`."""
    said = verdict(results)
    if results.settings.get("study", {}).get("small"):
        said = Verdict(
            "It works", ("", "Tiny networks, a few steps: nothing here compares methods.")
        )
    title = results.title or "Study"
    # The first sentence lists the scores, which the tiles show.
    lead = "".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in said.sentences[1:])
    header = _header(title, said.title, lead + sections.tiles(results))
    parts = [
        sections.scores(results),
        sections.samples(results, base=base),
        sections.training(results),
        sections.ledger(results),
    ]
    parts.append(sections.numbers(results))
    return page.page(
        header + _main(parts) + _footer(results.attribution), title=f"{title}: {said.title}"
    )


def read_run(path: Path) -> RunFolder:
    """A run folder's metrics, recipe and sample pictures. Raises as `read_metrics` does."""
    metrics = read_metrics(path)
    recipe = read_json(path / "recipe.json") if (path / "recipe.json").is_file() else {}
    pictures = sorted(path.glob("samples/**/*.png"))[:PICTURES_AT_MOST]
    return RunFolder(path.resolve().name, path, metrics, recipe, tuple(pictures))


def runs_page(runs: Sequence[RunFolder]) -> str:
    """The page of plain training runs: curves, samples where there are some, and settings."""
    names = [run.name for run in runs]
    keys = [
        name if names.count(name) == 1 else str(run.path)
        for name, run in zip(names, runs, strict=True)
    ]
    keys = [key.replace("/", "·") for key in keys]
    curves = {f"{key}/0": curve_from(run.metrics) for key, run in zip(keys, runs, strict=True)}
    results = Results(rows=(), curves=curves)
    title = keys[0] if len(runs) == 1 else f"{len(runs)} training runs"
    lines = "".join(
        f"<p class='lead'>{escape(_sum_up(run, alone=len(runs) == 1))}</p>" for run in runs
    )
    parts = [_scores(runs, keys), sections.training(results)]
    for key, run in zip(keys, runs, strict=True):
        if run.pictures:
            strip = "".join(f"<figure>{page.picture(p, alt=p.stem)}</figure>" for p in run.pictures)
            parts.append(page.section(f"Samples of {key}", f'<div class="strip">{strip}</div>'))
        else:
            hint = f"None yet: `erw sample {run.name} --out {run.name}/samples` draws some."
            parts.append(page.section(f"Samples of {key}", note=escape(hint)))
    settings = [
        page.details(f"Settings of {key}", page.definitions(page.flatten(run.recipe)))
        for key, run in zip(keys, runs, strict=True)
        if run.recipe
    ]
    parts.append(page.section("How it was made", *settings) if settings else "")
    built_in = any(_vae(run).startswith("openmoji") for run in runs)
    footer = _footer(f"Images: {ATTRIBUTION}." if built_in else "")
    return page.page(_header("Training run", title, lines) + _main(parts) + footer, title=title)


def _scores(runs: Sequence[RunFolder], keys: Sequence[str]) -> str:
    """The scores taken while training, one figure for each name, a line for each run."""
    tracks: dict[str, list[Track]] = {}
    for key, run in zip(keys, runs, strict=True):
        lines = [line for line in log_lines(run.path / "metrics.jsonl") if line["kind"] == "eval"]
        for name in dict.fromkeys(name for line in lines for name in line["values"]):
            mine = [line for line in lines if name in line["values"]]
            steps, costs = (tuple(line[k] for line in mine) for k in ("step", "flops_total"))
            scores = tuple(line["values"][name] for line in mine)
            tracks.setdefault(name, []).append(Track(key, 0, steps, costs, scores))
    if not tracks:
        return ""
    figures = [
        page.figure(
            partial(score_over_cost, {"metric": name, "tracks": [t._asdict() for t in found]}),
            name=f"while-training-{name.replace('_', '-')}",
            label=f"{name} over training compute, a line for each run",
            half=len(tracks) > 1,
        )
        for name, found in tracks.items()
    ]
    note = "A few samples of the EMA model, the same seeds each time: for following a run."
    return page.section("Scores while training", *figures, note=note)


def score_over_cost(record: dict[str, Any], size: tuple[float, float], theme: Theme) -> Any:
    """`target_figure` over FLOPs without a target."""
    whole = {"over": "flops", "target": None, "reached": [], **record}
    return target_figure(whole, theme, size=size)


def _vae(run: RunFolder) -> str:
    return str(run.recipe.get("cache", {}).get("vae", ""))


def _header(kind: str, title: str, below: str) -> str:
    button = '<button id="theme" hidden></button>'
    top = f'<div class="top"><span><b>erw</b>&ensp;{escape(kind)}</span>{button}</div>'
    unbroken = escape(title).replace("FD-Lite2", "FD&#8209;Lite2")
    return f"<header>\n{top}\n<h1>{unbroken}</h1>\n{below}\n</header>\n"


def _main(parts: Sequence[str]) -> str:
    return "<main>\n" + "\n".join(part for part in parts if part) + "\n</main>\n"


def _footer(attribution: str) -> str:
    text = f"<p>{escape(attribution)}</p>" if attribution else ""
    made = "<p>Made by <code>erw report</code>. This page is complete: it loads nothing.</p>"
    return f"<footer>\n{text}\n{made}\n</footer>"


def _sum_up(run: RunFolder, *, alone: bool) -> str:
    """One sentence on a run: how far, what it cost, where the losses stand."""
    last = run.metrics[-1]
    warm = sum(is_warmup(line) for line in run.metrics)
    cost = page.flops(last["flops_total"])
    text = f"Step {page.count(last['step'])}, {cost}, {page.duration(last['seconds'])} of training"
    if warm:
        share = last.get("flops_warmup", 0) / max(last["flops_total"], 1)
        text += f", {share:.0%} of the compute in warm-up"
    text += f". The last loss is {last['loss']:.3f}."
    return text if alone else f"{run.name}: {re.sub('^Step', 'step', text)}"
