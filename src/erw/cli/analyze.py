"""`erw analyze`: what networks know at which depth, noise time and step, as JSON and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erw.cli.sample import pick_device
from erw.cli.settings import Parser, add_settings, changed
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.evaluation.probing import Material


@dataclass(frozen=True)
class Analysis:
    """What is measured.

    Attributes:
        metric: cknna, cka and mutual_knn compare with an encoder; probe and knn are accuracies of
            classes; spatial needs the tokens alone.
        cache: images with the encoder's features; none: the cache that the first run names.
        images: images that are in no cache, instead: a folder, zip, table, or openmoji-test.
        encoder: one of the cache's, or any, which is then run on the images.
        vae: of images that are in no cache; none: the network's own.
        times: noise times, 0 (clean) to 1 (noise alone).
        depths: after which blocks, from 1; empty: all.
        count: images; REPA has 10,000.
        k: neighbours of cknna and mutual_knn.
        unbiased: the estimate of HSIC that cknna and cka take; false: the biased one.
        labels: null withholds each image's class from the network.
        checkpoints: every checkpoint that a run keeps; false: its last weights alone.
        checkpoint: one alone: last, best, or a step.
        layout: of a released checkpoint, where its keys leave it open.
        num_heads: of a released checkpoint, where neither width nor shapes say it.
        batch_size: images at once.
    """

    metric: Literal["cknna", "cka", "mutual_knn", "probe", "knn", "spatial"] = "cknna"
    cache: str | None = None
    images: str | None = None
    encoder: str | None = None
    vae: str | None = None
    times: tuple[float, ...] = (0.0,)
    depths: tuple[int, ...] = ()
    count: int = 2000
    k: int = 10
    unbiased: bool = True
    labels: Literal["null", "given"] = "null"
    checkpoints: bool = True
    checkpoint: str | None = None
    layout: str = "auto"
    num_heads: int | None = None
    batch_size: int = 64


def analyze(args: Sequence[str]) -> None:
    """Measure networks block by block; print the values, or write them as JSON beside figures."""
    text = (
        "RUN: folders of training runs, or released checkpoints. Depth counts blocks, from 1.\n"
        "Figures are drawn over depth and, where there are several, over steps and noise times."
    )
    usage = "RUN... [--metric cknna] [--out STEM] [--SETTING VALUE ...]"
    parser = Parser("erw analyze", text, usage=usage)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", metavar="STEM", help="write STEM.json and the figure, STEM-light.svg and others"
    )
    add_settings(parser, Analysis())
    found = parser.read(args)
    record = measured(found.runs, changed(Analysis(), found))
    for p in record["points"]:
        place = f"{p['run']}  step {p['step']:<8} t {p['time']:<5g} depth {p['depth']:<3}"
        print(f"{place} {p['value']:.4f}")
    if record["reference"] is not None:
        print(f"{record['encoder']} itself {record['reference']:.4f}")
    print("".join(f"{line}\n" for line in histories(record["history"])), end="")
    if found.out:
        from erw.study.knowledge import save_knowledge

        print("\n".join(str(path) for path in save_knowledge(record, found.out)))


def measured(runs: Sequence[str], how: Analysis) -> dict[str, Any]:
    """The values with everything that they depend on, as JSON values."""
    from erw.evaluation.probing import curve, reference
    from erw.log import Console
    from erw.study.knowledge import history

    options: dict[str, Any] = {"metric": how.metric, "times": how.times, "depths": how.depths}
    options |= {"k": how.k, "unbiased": how.unbiased}
    options |= {"labels": how.labels, "batch_size": how.batch_size}
    names = [Path(run).stem if Path(run).is_file() else Path(run).name for run in runs]
    if len(set(names)) < len(names):
        names = list(runs)
    for run in runs:
        if not Path(run).exists():
            raise FileNotFoundError(f"{run} is neither a run nor a checkpoint: nothing is there")
    console, points = Console("analyze"), list[dict[str, Any]]()
    known: dict[Any, Material] = {}
    for i, run in enumerate(runs):
        for model in opened(run, how):
            shown = material_for(model, how, known)
            points += [p._asdict() for p in curve(model, shown, **options, name=names[i])]
        console.step(i + 1, len(runs))
    return {
        **asdict(how),
        "encoder": shown.encoder,
        "count": len(shown.rows),
        "points": points,
        "reference": reference(shown, metric=how.metric),
        "history": history(points),
    }


def opened(run: str, how: Analysis) -> Iterator[Any]:
    """The networks that a run's folder or a released checkpoint holds, one at a time."""
    from erw.evaluation.probing import checkpoints
    from erw.interop import load_pretrained
    from erw.training.checkpoint import paths
    from erw.training.trained import is_run, load

    device = pick_device("auto")
    if not is_run(run):
        yield load_pretrained(run, how.layout, num_heads=how.num_heads, device=device)
    elif how.checkpoint or not how.checkpoints or not paths(Path(run) / "checkpoints"):
        yield load(run, checkpoint=how.checkpoint or "last", device=device)
    else:
        yield from (model for _, model in checkpoints(run, device=device))


def material_for(model: Any, how: Analysis, known: dict[Any, Material]) -> Material:
    """What a network is shown: made once for all networks with the same latents."""
    from erw.encoders.vae import load_vae
    from erw.evaluation.probing import material, uncached

    run = getattr(model, "run", None)
    if how.images is None:
        if not known:
            cache = how.cache or (run and hasattr(model, "class_names") and run.data.cache)
            if not cache:
                raise ConfigError("give --cache, or --images with --encoder: a released checkpoint "
                                  "does not name the images that it was trained on")  # fmt: skip
            known[None] = material(cache, encoder=how.encoder, count=how.count)
        return known[None]
    encoder = how.encoder or next(iter(run.data.features if run else ()), None)
    if encoder is None:
        raise ConfigError("--images needs --encoder, whose features are compared with")
    if getattr(model, "scaling", None):
        raise ConfigError(
            "this run's latents are scaled as its own cache has measured: give --cache"
        )
    vae = how.vae or model.vae
    key = (vae, model.latent_shape)
    if key not in known:
        size = model.latent_shape[-1] * load_vae(vae).factor
        named: dict[str, Any] = {"vae": vae, "encoder": encoder, "image_size": size}
        with uncached(how.images, **named, count=how.count) as cache:
            known[key] = material(cache, count=how.count)
    return known[key]


def histories(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each run and time: how many blocks fall and come back, a U over steps."""
    for run, time in dict.fromkeys((h["run"], h["time"]) for h in found):
        mine = [h for h in found if (h["run"], h["time"]) == (run, time)]
        bent = [h for h in mine if h["u_shaped"]]
        said = f"{run}  t {time:g}: {len(bent)} of {len(mine)} blocks fall and come back over steps"
        if bent:
            low, high = min(h["step"] for h in bent), max(h["step"] for h in bent)
            said += f", lowest at step {low:,}" + f" to {high:,}" * (high > low)
        yield said
