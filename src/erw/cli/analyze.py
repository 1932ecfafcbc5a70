"""`erw analyze`: what networks know at which depth, noise time and step, as JSON and figures."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from erw import interop, training
from erw.cli.settings import RunDirs, Settings, required
from erw.errors import ConfigError
from erw.log import Progress


@dataclass(frozen=True)
class Analysis:
    """What is measured."""

    # cknna and cka compare with an encoder; probe and knn are accuracies of classes.
    metric: Literal["cknna", "cka", "probe", "knn"] = "cknna"
    cache: str | None = None  # images with features; none: the cache that the first run names
    encoder: str | None = None  # one of the cache's; none: its first
    times: tuple[float, ...] = (0.0,)  # noise times, 0 (clean) to 1 (noise alone)
    depths: tuple[int, ...] = ()  # after which blocks, from 1; empty: all
    count: int = 2000  # images; REPA has 10,000
    k: int = 10  # neighbours of cknna and knn
    checkpoint: str = "all"  # all that a run keeps, or one: last, best, or a step
    layout: str = "auto"  # of a released checkpoint, where its keys leave it open
    num_heads: int | None = None  # likewise, where neither width nor shapes say it


def analyze(runs: RunDirs, options: Settings[Analysis], *, out: str | None = None) -> None:
    """Measure networks block by block: what they know at which depth, noise time and step.

    Args:
        runs: folders of training runs, or released checkpoints.
        out: write OUT.json, and figures over depth and, where there are several, over steps and
            noise times: OUT-light.svg and others.
    """
    if not runs:
        raise ConfigError("erw analyze needs a run first; see erw analyze --help")
    required(*runs)
    from erw.evaluation.probing import METRICS, curve, material
    from erw.study.knowledge import history, save_knowledge

    names = [Path(run).stem if Path(run).is_file() else Path(run).name for run in runs]
    names = names if len(set(names)) == len(names) else list(runs)
    measured = {name: getattr(options, name) for name in ("metric", "times", "depths", "k")}
    points: list[dict[str, Any]] = []
    images: Any = None
    with Progress("analyze", len(runs)) as progress:
        for run, name in zip(runs, names, strict=True):
            for model in models_of(run, options):
                cache: Any = options.cache or model.run.data.cache
                images = images or material(cache, encoder=options.encoder, count=options.count)
                points += [p._asdict() for p in curve(model, images, **measured, name=name)]
            progress.update()
    for p in points:
        place = f"{p['run']}  step {p['step']:<8} t {p['time']:<5g} depth {p['depth']:<3}"
        print(f"{place} {p['value']:.4f}")
    reference = None
    if options.metric in ("probe", "knn"):
        reference = METRICS[options.metric](images.target, images, options.k)
        print(f"{images.encoder} itself {reference:.4f}")
    changes = history(points)
    for title, blocks in groupby(changes, lambda block: f"{block['run']}  t {block['time']:g}"):
        bent = [block["u_shaped"] for block in blocks]
        print(f"{title}: {sum(bent)} of {len(bent)} blocks fall and come back over steps")
    if out:
        record = {
            **asdict(options),
            "encoder": images.encoder,
            "count": len(images.rows),
            "points": points,
            "reference": reference,  # the encoder's own accuracy
            "history": changes,
        }
        print("\n".join(map(str, save_knowledge(record, out))))


def models_of(run: str, options: Analysis) -> Iterator["training.Trained"]:
    """The networks that a run's folder or a released checkpoint has, one at a time."""
    from erw.dist import current
    from erw.training.checkpoint import paths, step_of

    if options.cache is None and interop.kind_of(run) == "released":
        raise ConfigError("a released checkpoint names no images: give --cache")
    reading = {"layout": options.layout, "num_heads": options.num_heads}
    steps = [str(step_of(path)) for path in paths(Path(run) / "checkpoints")] or ["last"]
    for checkpoint in steps if options.checkpoint == "all" else [options.checkpoint]:
        yield interop.open_model(run, checkpoint=checkpoint, device=current().device, **reading)
