"""`erw analyze`: what networks know at which depth, noise time and step, as JSON and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from erw.cli.settings import Settings, call
from erw.data.on_the_fly import write
from erw.data.sources import BUILT_IN
from erw.dist import current
from erw.encoders.vae import load_vae
from erw.errors import ConfigError
from erw.evaluation.probing import METRICS, Material, curve, material
from erw.interop import load_pretrained
from erw.log import Progress
from erw.study.knowledge import history, save_knowledge
from erw.training import Trained, load
from erw.training.checkpoint import paths, step_of
from erw.training.trained import is_run


@dataclass(frozen=True)
class Analysis:
    """What is measured.

    Attributes:
        metric: cknna and cka compare with an encoder; probe and knn are accuracies of
            classes.
        cache: images with the encoder's features; none: the cache that the first run names.
        images: images that are in no cache, instead: a folder, zip, table, or openmoji-test.
        encoder: one of the cache's, or any, which is then run on the images.
        vae: of images that are in no cache; none: the network's own.
        times: noise times, 0 (clean) to 1 (noise alone).
        depths: after which blocks, from 1; empty: all.
        count: images; REPA has 10,000.
        k: neighbours of cknna.
        unbiased: the estimate of HSIC that cknna and cka take; false: the biased one.
        checkpoints: every checkpoint that a run keeps; false: its last weights alone.
        checkpoint: one alone: last, best, or a step.
        layout: of a released checkpoint, where its keys leave it open.
        num_heads: of a released checkpoint, where neither width nor shapes say it.
    """

    metric: Literal["cknna", "cka", "probe", "knn"] = "cknna"
    cache: str | None = None
    images: str | None = None
    encoder: str | None = None
    vae: str | None = None
    times: tuple[float, ...] = (0.0,)
    depths: tuple[int, ...] = ()
    count: int = 2000
    k: int = 10
    unbiased: bool = True
    checkpoints: bool = True
    checkpoint: str | None = None
    layout: str = "auto"
    num_heads: int | None = None


def main(args: Sequence[str]) -> None:
    call("analyze", analyze, args)


def analyze(
    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")],
    how: Settings[Analysis],
    *,
    out: str | None = None,
) -> None:
    """Measure networks block by block: what they know at which depth, noise time and step.

    Args:
        runs: folders of training runs, or released checkpoints.
        how: what is measured; depth counts blocks, from 1.
        out: write OUT.json, and figures over depth and, where there are several, over steps and
            noise times: OUT-light.svg and others.
    """
    record = measured(runs, how)
    for p in record["points"]:
        place = f"{p['run']}  step {p['step']:<8} t {p['time']:<5g} depth {p['depth']:<3}"
        print(f"{place} {p['value']:.4f}")
    if record["reference"] is not None:
        print(f"{record['encoder']} itself {record['reference']:.4f}")
    for line in histories(record["history"]):
        print(line)
    if out:
        print("\n".join(map(str, save_knowledge(record, out))))


def measured(runs: Sequence[str], how: Analysis) -> dict[str, Any]:
    """The values with everything that they depend on, as JSON values."""
    if not runs:
        raise ConfigError("erw analyze needs a run first; see erw analyze --help")
    for run in runs:
        if not Path(run).exists():
            raise FileNotFoundError(f"{run} is neither a run nor a checkpoint: nothing is there")
    names = [Path(run).stem if Path(run).is_file() else Path(run).name for run in runs]
    if len(set(names)) < len(names):
        names = list(runs)
    settings = asdict(how)
    same = ("metric", "times", "depths", "k", "unbiased")
    options = {name: settings[name] for name in same}
    points: list[dict[str, Any]] = []
    loaded: dict[Any, Material] = {}
    with Progress("analyze", len(runs)) as progress:
        for run, name in zip(runs, names, strict=True):
            for model in models_of(run, how):
                images = material_for(model, how, loaded)
                points += [p._asdict() for p in curve(model, images, **options, name=name)]
            progress.update()
    reference = None  # the encoder's own
    if how.metric in ("probe", "knn"):
        reference = METRICS[how.metric](images.target, images, how.k, how.unbiased)
    return {
        **settings,
        "encoder": images.encoder,
        "count": len(images.rows),
        "points": points,
        "reference": reference,
        "history": history(points),
    }


def models_of(run: str, how: Analysis) -> Iterator[Trained]:
    """The networks that a run's folder or a released checkpoint has, one at a time."""
    device = current().device
    if not is_run(run):
        yield load_pretrained(run, how.layout, num_heads=how.num_heads, device=device)
        return
    kept = [str(step_of(path)) for path in paths(Path(run) / "checkpoints") if how.checkpoints]
    for checkpoint in [how.checkpoint] if how.checkpoint else kept or ["last"]:
        yield load(run, checkpoint=checkpoint, device=device)


def material_for(model: Trained, how: Analysis, loaded: dict[Any, Material]) -> Material:
    """Latents and features for a network, loaded once for all networks with the same latents."""
    if how.images is None:
        if not loaded:
            cache: Any = how.cache
            if cache is None and is_run(model.source):
                cache = model.run.data.cache
            if cache is None:
                raise ConfigError(
                    "give --cache, or --images with --encoder: a released checkpoint does not name "
                    "the images that it was trained on"
                )
            loaded[None] = material(cache, encoder=how.encoder, count=how.count)
        return loaded[None]
    encoder = how.encoder or next(iter(model.run.data.features), None)
    if encoder is None:
        raise ConfigError("--images needs --encoder, whose features are compared with")
    if model.scaling:
        raise ConfigError(
            "this run's latents are scaled as its own cache has measured: give --cache"
        )
    vae = how.vae or model.vae
    key = (vae, model.latent_shape)
    if key not in loaded:
        size = model.latent_shape[-1] * load_vae(vae).factor
        options: dict[str, Any] = {"vae": vae, "encoders": (encoder,), "image_size": size}
        if how.images in BUILT_IN:
            options |= {"size": size, "count": how.count}
        with TemporaryDirectory() as folder:  # read as if from a cache, encoded on the way
            images = write(how.images, folder, precision="float32", **options)
            loaded[key] = material(images, count=how.count)
    return loaded[key]


def histories(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each run and time: how many blocks fall and come back over steps, as a U."""
    for run, time in dict.fromkeys((line["run"], line["time"]) for line in lines):
        blocks = [line for line in lines if (line["run"], line["time"]) == (run, time)]
        bent = [line["step"] for line in blocks if line["u_shaped"]]
        text = (
            f"{run}  t {time:g}: {len(bent)} of {len(blocks)} blocks fall and come back over steps"
        )
        if bent:
            low, high = min(bent), max(bent)
            text += f", lowest at step {low:,}" + f" to {high:,}" * (high > low)
        yield text
