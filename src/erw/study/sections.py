"""The sections of a report, each from `Results` to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from erw.study import page
from erw.study.compare import finals, finished, mean_curve, name_of, saving
from erw.study.marks import axis_for
from erw.study.plots import curve_figure, ledger_figure, score_figure
from erw.study.results import Results, Row
from erw.study.style import PAGE, Theme

AXES = (("flops", "Compute"), ("seconds", "Time"), ("step", "Steps"))
CURVES = (("flow", "Flow-matching loss"), ("align", "Alignment loss"))


def _tint(method: str, methods: Sequence[str]) -> str:
    """The CSS value of a method's colour."""
    code = PAGE.color(method, among=methods)
    names = {
        **{c: n for n, c in PAGE.series.items()},
        **{c: f"spare-{i}" for i, c in enumerate(PAGE.spare)},
    }
    return f"--tint: var(--{names[code]})"


def tiles(results: Results) -> str:
    """One tile a method: final score, spread, what it took."""
    if not results.rows:
        return ""
    tiles = []
    for method in results.methods:
        scores, last = finals(results, method), mean_curve(results, method)[-1]
        row = _last(results, method)
        spread = ""
        if len(scores) > 1:
            spread = f"<p>{min(scores):.1f} to {max(scores):.1f} over {len(scores)} seeds</p>"
        cost = f"{page.count(row.step)} steps · {page.flops(last.x)} · {page.duration(row.seconds)}"
        gain = _gain(results, method)
        tiles.append(
            f'<div class="tile" style="{_tint(method, results.methods)}">'
            f"<h3>{escape(name_of(method))}</h3>"
            f'<div class="score">{sum(scores) / len(scores):.1f}</div>{spread}'
            f'<p class="gain">{escape(gain)}</p><p>{cost}</p></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _gain(results: Results, method: str) -> str:
    """What a method's tile says against SiT."""
    if method == "sit" or "sit" not in results.methods:
        return "the baseline" if method == "sit" else ""
    done, _ = finished(results)
    if not {method, "sit"} <= set(done):
        return "still under way"
    item = saving(results, method, "sit")
    if item.ratio is None:
        return "SiT’s final score not reached"
    return f"SiT’s final score at {'≤ ' if item.at_most else ''}{item.ratio:.2f}× the compute"


def _last(results: Results, method: str) -> Row:
    return results.of(method, results.seeds(method)[0])[-1]


def scores(results: Results) -> str:
    """The score over compute, large, and over seconds and steps beside each other."""
    if not results.rows:
        return ""
    note = (
        "Every method gets the same number of FLOPs; warm-up, projector and teacher are counted. "
        "Time is training alone: preparing (with the teacher) and scoring are not in it. "
        "Each point is the EMA model’s samples against held-out images"
    )
    samples = results.settings.get("study", {}).get("samples")
    note += f", {page.count(samples)} at a time." if samples else "."
    if any(len(results.seeds(m)) > 1 for m in results.methods):
        note += " Lines are means over seeds, dots single seeds, bands their extremes."

    def draw(over: str, *, half: bool) -> str:
        label = f"FD-Lite2 over {axis_for(results, over).label}, a line for each method"
        return page.figure(
            lambda size, theme: score_figure(results, over=over, size=size, theme=theme),
            name=f"score-{over}",
            label=label,
            half=half,
        )

    pair = f'<div class="pair">{draw("seconds", half=True)}{draw("step", half=True)}</div>'
    return page.section("Quality at equal cost", draw("flops", half=False), pair, note=note)


def samples(results: Results, *, base: Path) -> str:
    """The same seeds and labels from each method over time: a row a method, a column a point."""
    blocks, widest = [], 0
    for method in results.methods if results.rows else ():
        rows = _some([r for r in results.of(method, results.seeds(method)[0]) if r.picture])
        widest = max(widest, len(rows))
        cells = "".join(_cell(row, base=base) for row in rows)
        if cells:
            tint = _tint(method, results.methods)
            name = escape(name_of(method))
            blocks.append(f'<div class="row"><h3 style="{tint}">{name}</h3>{cells}</div>')
    if not blocks:
        return ""
    names = {"reference": "held-out images", "reconstruction": "the same through the VAE"}
    real = "".join(
        f"<figure>{page.picture(base / path, alt=names.get(name, name))}"
        f"<figcaption><b>{escape(names.get(name, name))}</b></figcaption></figure>"
        for name, path in results.pictures.items()
    )
    if real:
        heading = '<h3 style="--tint: var(--ink)">What good looks like</h3>'
        real = f'<div class="row">{heading}{real}</div>'
    grid = f'<div class="samples" style="--columns: {max(widest, 2)}">{"".join(blocks)}{real}</div>'
    note = (
        "Same seeds and labels everywhere, never picked by hand: the same place in each grid "
        "started from the same noise."
    )
    return page.section("Samples over time", grid, note=note)


def _some(rows: list[Row], *, most: int = 4) -> list[Row]:
    """At most four of the rows, evenly over them, the last among them: more would be too small."""
    if len(rows) <= most:
        return rows
    return [rows[round((i + 1) * len(rows) / most) - 1] for i in range(most)]


def _cell(row: Row, *, base: Path) -> str:
    share = f"{100 * row.fraction:.0f} % of the budget" if row.fraction else f"step {row.step}"
    image = page.picture(base / str(row.picture), alt=f"{name_of(row.method)} samples at {share}")
    return f"<figure>{image}<figcaption><b>{row.fd_lite2:.0f}</b> · {share}</figcaption></figure>"


def training(results: Results) -> str:
    """Loss and alignment over any of the three costs."""
    if not results.curves:
        return ""
    panes, choices = [], []
    for place, (over, word) in enumerate(AXES):
        drawn = "".join(_curve(results, key, title, over=over) for key, title in CURVES)
        panes.append(f'<div class="pane over-{over}"><div class="pair">{drawn}</div></div>')
        state = " checked" if place == 0 else ""
        choices.append(
            f'<label><input type="radio" name="axis" class="to-{over}"{state}>{word}</label>'
        )
    chosen = f'<fieldset class="axes" aria-label="Drawn over">{"".join(choices)}</fieldset>'
    switch = f'<div class="switch">{chosen}{"".join(panes)}</div>'
    note = "Means over neighbouring steps."
    if any(any(curve["warmup"]) for curve in results.curves.values()):
        note += " Shaded: warm-up, in which only the first blocks run and there is no flow loss."
    return page.section("Training", switch, note=note)


def _curve(results: Results, key: str, title: str, *, over: str) -> str:
    """One loss over one cost; nothing if no run has that loss."""
    if all(value is None for curve in results.curves.values() for value in curve[key]):
        return ""

    def draw(size: tuple[float, float], theme: Theme) -> Any:
        return curve_figure(results, key=key, title=title, over=over, size=size, theme=theme)

    label = f"{title} over {axis_for(results, over).label}"
    return page.figure(draw, name=f"{key}-{over}", label=label, half=True)


def ledger(results: Results) -> str:
    """Where the FLOPs went, as bars and as a table."""
    entries = [results.ledger[m] for m in results.methods if m in results.ledger]
    if not entries:
        return ""
    names = [name_of(m) for m in results.methods if m in results.ledger]

    def cost(flops: float) -> str:
        return page.flops(flops) if flops else "–"

    def step(entry: dict[str, Any], part: str) -> str:
        batch = entry["batch"]["warmup" if part == "warmup" else "full"]
        return cost(batch * entry["per_image"][part])

    rows = [
        ["Warm-up step", *(step(e, "warmup") for e in entries)],
        ["Full step", *(step(e, "full") for e in entries)],
        ["Projector, each aligned step", *(step(e, "projector") for e in entries)],
        ["Teacher, each image once", *(cost(e["per_image"]["teacher"]) for e in entries)],
        ["Steps of warm-up", *(page.count(e["steps"]["warmup"]) for e in entries)],
        ["Full steps", *(page.count(e["steps"]["full"]) for e in entries)],
        ["Images seen by the teacher", *(page.count(e["distinct_images"]) for e in entries)],
        ["Total", *(cost(e["flops_total"]) for e in entries)],
    ]
    height = 60 + 56 * len(entries)
    drawn = page.figure(
        lambda size, theme: ledger_figure(results, size=(size[0], height), theme=theme),
        name="ledger",
        label="Total FLOPs of each method, split into warm-up, full steps, projector and teacher",
    )
    note = (
        "A multiply-add is two FLOPs; forward and backward are counted, optimiser and EMA are "
        "not. The teacher looks at each prepared image once, and is charged when training first "
        "meets the image."
    )
    return page.section("Where the compute went", drawn, page.table(["", *names], rows), note=note)


def numbers(results: Results) -> str:
    """Everything behind the figures: rows, settings, versions, hardware."""
    head = ["Method", "Seed", "Step", "Images", "FLOPs", "of it warm-up"]
    head += ["Time", "FD-Lite2", "Flow loss", "Alignment"]
    rows = [_numbers_of(row) for row in results.rows]
    floors = {
        "vae_reconstruction": "FD-Lite2 of held-out images through the VAE",
        "train_images": "FD-Lite2 of training images",
    }
    parts = [page.details("All evaluation points", page.table(head, rows))] if rows else []
    named = [(floors.get(name, name), f"{value:.1f}") for name, value in results.floors.items()]
    for title, pairs in (
        ("Floors: what a perfect model would score", named),
        ("Settings", page.flatten(dict(results.settings))),
        ("Versions and hardware", page.flatten({**results.versions, **results.hardware})),
    ):
        if pairs:
            parts.append(page.details(title, page.definitions(pairs)))
    return page.section("How it was made", *parts)


def _numbers_of(row: Row) -> list[str]:
    name, cost = name_of(row.method), [page.flops(row.flops_total), page.flops(row.flops_warmup)]
    begun = [name, str(row.seed), page.count(row.step), page.count(row.images), *cost]
    losses = [page.number(row.loss), page.number(row.align)]
    return [*begun, page.duration(row.seconds), f"{row.fd_lite2:.1f}", *losses]
