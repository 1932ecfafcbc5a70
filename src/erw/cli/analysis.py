"""`erw analyze`: what runs know at which depth, noise time and step, as JSON and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erw.cli.images import pick_device
from erw.cli.settings import Parser, add_settings, changed
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.evaluate.analysis import Point


@dataclass(frozen=True)
class Analysis:
    """What is measured.

    Attributes:
        metric: cknna, cka and mutual_knn compare with an encoder; probe and knn are accuracies of
            classes; spatial needs the tokens alone.
        cache: images with the encoder's features; none: the cache that the first run names.
        encoder: one of the cache's, or any whose features are then made of the cache's images.
        times: noise times, 0 (clean) to 1 (noise alone).
        depths: after which blocks, from 1; empty: all.
        count: images; REPA has 10,000.
        k: neighbours of cknna and mutual_knn.
        labels: null withholds each image's class from the network.
        checkpoints: every checkpoint that the runs keep, instead of their EMA weights alone.
        batch_size: images at once.
    """

    metric: Literal["cknna", "cka", "mutual_knn", "probe", "knn", "spatial"] = "cknna"
    cache: str | None = None
    encoder: str | None = None
    times: tuple[float, ...] = (0.0,)
    depths: tuple[int, ...] = ()
    count: int = 2000
    k: int = 10
    labels: Literal["null", "given"] = "null"
    checkpoints: bool = False
    batch_size: int = 64


def analyze(args: Sequence[str]) -> None:
    """Measure runs block by block; print the values, or write them as JSON beside a figure."""
    text = "RUN: folders of training runs. Depth counts blocks, from 1."
    usage = "RUN... [--metric cknna] [--out STEM] [--SETTING VALUE ...]"
    parser = Parser("erw analyze", text, usage=usage)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", metavar="STEM", help="write STEM.json and the figure, STEM-light.svg and others"
    )
    add_settings(parser, Analysis())
    found = parser.read(args)
    how = changed(Analysis(), found)
    record = measured(found.runs, how)
    for p in record["points"]:
        place = f"{p['run']}  step {p['step']:<8} t {p['time']:<5g} depth {p['depth']:<3}"
        print(f"{place} {p['value']:.4f}")
    if record["reference"] is not None:
        print(f"{record['encoder']} itself {record['reference']:.4f}")
    if found.out:
        from erw.study.plots import save_figure

        drawn = save_figure(lambda theme: figure(record, theme), found.out, data=record)
        print("\n".join(str(path) for path in drawn))


def measured(runs: Sequence[str], how: Analysis) -> dict[str, Any]:
    """The values with everything that they depend on, as JSON values."""
    from erw.evaluate.analysis import curve, curve_over_steps, reference
    from erw.evaluate.hidden import material
    from erw.runtime.log import Console
    from erw.train import load

    models = [load(run, device=pick_device("auto")) for run in runs]
    shown = material(how.cache or models[0].run.data.cache, encoder=how.encoder, count=how.count)
    options: dict[str, Any] = {"metric": how.metric, "times": how.times, "depths": how.depths}
    options |= {"k": how.k, "labels": how.labels, "batch_size": how.batch_size}
    console, points = Console("analyze"), list[dict[str, Any]]()
    names = [Path(run).name for run in runs]
    if len(set(names)) < len(names):
        names = list(runs)
    for i, (model, run) in enumerate(zip(models, runs, strict=True)):
        named = {**options, "name": names[i]}
        found = curve_over_steps(model, run, shown, **named) if how.checkpoints else None
        points += [_json(p) for p in (found or curve(model, shown, **named))]
        console.step(i + 1, len(runs))
    return {
        **asdict(how),
        "encoder": shown.encoder,
        "count": len(shown.rows),
        "points": points,
        "reference": reference(shown, metric=how.metric),
    }


def _json(point: Point) -> dict[str, Any]:
    return point._asdict()


NAMES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "mutual_knn": "Mutual nearest neighbours",
    "probe": "Linear probe, accuracy",
    "knn": "Nearest neighbours, accuracy",
    "spatial": "Spatial structure (local less distant similarity)",
}


def figure(record: dict[str, Any], theme: Any) -> Any:
    """Values over depth: a line per run, step and time."""
    from erw.study import marks

    points = record["points"]
    if not points:
        raise ConfigError("nothing was measured: no runs, times or depths")
    keys = list(dict.fromkeys((p["run"], p["step"], p["time"]) for p in points))
    told = [len({key[i] for key in keys}) > 1 for i in range(3)]  # say only what differs
    title = NAMES[record["metric"]]
    if record["metric"] in ("cknna", "cka", "mutual_knn"):
        title += f" with {record['encoder']}"
    with marks.drawing(theme):
        drawn, ax = marks.canvas((800, 400), title=title, label="block", right=150)
        ends = []
        for i, key in enumerate(keys):
            line = [p for p in points if (p["run"], p["step"], p["time"]) == key]
            color = theme.spare[i % len(theme.spare)]
            xs, ys = [p["depth"] for p in line], [p["value"] for p in line]
            ax.plot(xs, ys, color=color, marker="o", markersize=5)
            parts = (key[0], f"{key[1]:,} steps", f"t = {key[2]:g}")
            name = ", ".join(part for part, said in zip(parts, told, strict=True) if said)
            ends.append(marks.End(xs[-1], ys[-1], name or key[0], color))
        if record["reference"] is not None:
            ax.axhline(record["reference"], color=theme.soft, linewidth=1.2, linestyle=(0, (4, 3)))
        marks.label_ends(drawn, ax, ends)
    return drawn
