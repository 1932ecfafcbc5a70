"""`erw memory`: does a model repeat its training images? The nearest of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from erw.cli.eval import images_of, run_or_images
from erw.cli.sample import BUILT_IN, pick_device
from erw.cli.settings import Parser, add_settings, changed
from erw.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from erw.evaluation.images import Images, ImageSet
    from erw.evaluation.memorization import Nearest

SHOWN = 8


@dataclass(frozen=True)
class Memory:
    """What samples are held against.

    Attributes:
        training: the images that were trained on: a folder, zip, .npz, cache with images, or
            openmoji; none: the run's own cache, if it holds images.
        held_out: images that were not trained on, to tell what distance is usual; none: the
            built-in test set where the training images are built in, else nothing.
        encoder: whose pooled features are compared, as erw prepare names them.
        count: how many built-in images to compose, of the training set and of the test set.
    """

    training: str | None = None
    held_out: str | None = None
    encoder: str = "efficientnet-lite2"
    count: int = 2000


def memory(args: Sequence[str]) -> None:
    """The nearest training image of every sample: distances, pairs and a picture."""
    from erw.evaluation.images import image_set

    what = "RUN: the folder of a run, whose samples are held against training images; or IMAGES."
    parser = Parser("erw memory", what, usage="RUN|IMAGES [--training IMAGES] [--SETTING VALUE ..]")
    parser.add_argument("--out", metavar="STEM", help="write STEM.json, STEM-light.png and others")
    add_settings(parser, Memory())
    model, found = run_or_images("memory", parser, args)
    how = changed(Memory(), found)
    images, size = images_of(args[0], model, found, count=how.count)
    samples = image_set(images, what="samples")
    training = image_set(_training(how, model, size=size), what="training images")
    held = how.held_out
    if held is None and str(how.training).startswith(BUILT_IN):
        held = f"{BUILT_IN}-test"
    sets = {"samples": samples, "training": training}
    if held is not None:
        sets["held_out"] = image_set(_images(held, how.count, size), what="held-out images")
    near, record = measured(sets, how)
    for name, value in record["distances"]["samples"].items():
        beside = (record["distances"]["held_out"] or {}).get(name)
        print(
            f"{name:<12}{value:.4f}" + (f"   held out {beside:.4f}" if beside is not None else "")
        )
    if near.suspicious is not None:
        print(f"{'suspicious':<12}{near.suspicious:.1%}   nearer than 99 % of held-out images")
    if found.out:
        from erw.evaluation.memorization import nearest_pairs
        from erw.study.plots import save_figure

        pairs = nearest_pairs(samples, training, near, count=SHOWN)
        drawn = save_figure(lambda theme: figure(near, pairs, theme), found.out, data=record)
        print("\n".join(str(path) for path in drawn))


def measured(sets: dict[str, ImageSet], how: Memory) -> tuple[Nearest, dict[str, Any]]:
    """The nearest images, and distances with everything that they depend on as JSON values."""
    from erw import __version__
    from erw.encoders.registry import load_encoder
    from erw.evaluation.images import same_resolution
    from erw.evaluation.memorization import nearest_images
    from erw.io import hash_tensors
    from erw.log import Console

    for name in sets:
        sides = sets["samples"].resolution, sets[name].resolution
        same_resolution(*sides, sets["samples"].name, f"{name} {sets[name].name}")
    encoder = load_encoder(how.encoder, device=pick_device("auto"))
    console, done, total = Console("memory"), 0, sum(one.count or 0 for one in sets.values())

    def progress(count: int) -> None:
        nonlocal done
        done += count
        console.step(done, total)

    near = nearest_images(
        sets["samples"],
        training=sets["training"],
        held_out=sets.get("held_out"),
        encoder=encoder,
        progress=progress,
    )
    distances = near.to_dict(top=64)
    told = {n: {"name": s.name, "hash": s.content, "count": s.count} for n, s in sets.items()}
    return near, {
        **told,
        "encoder": encoder.name,
        "encoder_weights": hash_tensors(encoder),
        "distance": "1 - cosine of pooled features",
        "nearest": distances.pop("nearest"),
        "suspicious": distances.pop("suspicious"),
        "distances": distances,
        "settings": sets["samples"].settings,
        "versions": {"erw": __version__},
    }


def figure(near: Nearest, pairs: tuple[list[Tensor], list[Tensor]], theme: Any) -> Any:
    """The nearest samples over their training images, above how all distances are distributed."""
    from erw.study import plots

    title = "Nearest samples, over the training image that is nearest to each"
    label = "distance to the nearest training image (1 - cosine), and how many are within"
    values = near.distance.sort().values
    usual = None if near.usual is None else near.usual.sort().values
    most = max(float(x[-1]) for x in (values, usual) if x is not None)
    with plots.style(theme):
        drawn, ax = plots.canvas((800, 540), title=title, label=label, ends=("held out",), top=290)
        for column, both in enumerate(zip(*pairs, strict=True)):
            for row, image in enumerate(both):
                place = drawn.add_axes((column / SHOWN, (400 - 104 * row) / 540, 0.115, 96 / 540))
                place.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
                place.set_axis_off()
                if row:
                    place.set_title(f"{values[column]:.3f}", fontsize=11, y=-0.2, color=theme.soft)
        ends = []
        for name, x, color in (
            ("held out", usual, theme.soft),
            ("samples", values, theme.spare[0]),
        ):
            if x is not None:
                y = [i / len(x) for i in range(len(x) + 1)]
                ax.step([0.0, *x.tolist(), most], [*y, 1.0], where="post", color=color)
                ends.append(plots.End(most, 1.0, name, color))
        ax.set_xlim(-0.01 * most, most)
        ax.set_ylim(0, 1.02)
        ax.set_yticks([0, 0.5, 1], ["0", "half", "all"])
        plots.label_ends(ax, ends)
    return drawn


def _training(how: Memory, model: Any, *, size: int | None) -> Images:
    if how.training is not None:
        return _images(how.training, how.count, size)
    run = getattr(model, "run", None)
    if run is None:
        raise ConfigError("--training is missing: the images that were trained on")
    from erw.data.cache import Cache

    return Cache.open(run.data.cache)


def _images(name: str, count: int, size: int | None) -> Images:
    from erw.evaluation.images import reference_images

    return reference_images(name, (), size=size, count=count)
