"""`erw memory`: does a model repeat its training images? The nearest of each sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erw import data, training
from erw.cli.eval import DRAW, samples_of
from erw.cli.sample import Draw
from erw.cli.settings import RunOrImages, Settings
from erw.errors import ConfigError
from erw.io import weight_hash, write_bytes, write_json
from erw.log import Progress


@dataclass(frozen=True)
class Memory:
    """What samples are compared with."""

    training: str | None = None  # images that were trained on; none: the run's cache
    held_out: str | None = None  # other images, for what is usual; none: openmoji-test for openmoji
    encoder: str = "efficientnet-lite2"  # whose pooled features are compared
    count: int = 2000  # how many built-in images to compose, of the training and of the test set


def memory(
    source: RunOrImages,
    options: Settings[Memory],
    draw: Settings[Draw] = DRAW,
    *,
    model: "training.Trained | None" = None,
    out: str | None = None,
) -> None:
    """Find the nearest training image of every sample: distances, pairs and a picture.

    Args:
        source: the folder of a run, whose samples are compared; or a folder, zip, .npz or cache of
            images.
        out: write OUT.json and OUT.png, the nearest samples above their training images.
    """
    import torch

    from erw.dist import current
    from erw.encoders.registry import load_encoder
    from erw.evaluation.images import image_set, reference_images
    from erw.evaluation.memorization import nearest_images
    from erw.sampling.preview import picture

    samples = samples_of(source, model, draw, options.count)
    learnt: Any = options.training or (model and data.Cache.open(model.run.data.cache))
    if learnt is None:
        raise ConfigError("--training is missing: the images that were trained on")
    held_out = options.held_out or ("openmoji-test" if learnt in data.BUILT_IN else None)
    sets: dict[str, Any] = {"samples": samples}
    for name, images in {"training": learnt, "held_out": held_out}.items():
        if isinstance(images, str):
            size = samples.resolution[0]
            images = reference_images(images, (), size=size, count=options.count)
        if images is not None:
            sets[name] = image_set(images, what=f"{name} images", like=samples)
    encoder = load_encoder(options.encoder, device=str(current().device))
    with Progress("memory", sum(s.count for s in sets.values()), unit="images") as progress:
        near = nearest_images(**sets, encoder=encoder, progress=progress.update)
    for name, q in (("least", 0.0), ("median", 0.5)):
        usual = "" if near.usual is None else f"   held out {near.usual.quantile(q):.4f}"
        print(f"{name:<12}{near.distance.quantile(q):.4f}{usual}")
    if near.suspicious is not None:
        print(f"{'suspicious':<12}{near.suspicious:.1%}   nearer than 99 % of held-out images")
    if out is None:
        return
    order = near.distance.argsort()
    columns = (order, near.number[order], near.distance[order])
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    record = {
        **{n: {"name": s.name, "hash": s.content, "count": s.count} for n, s in sets.items()},
        "encoder": encoder.name,
        "encoder_weights": weight_hash(encoder),
        "nearest": [dict(zip(("sample", "image", "distance"), row, strict=True)) for row in rows],
        "suspicious": near.suspicious,
        "usual": None if near.usual is None else near.usual.tolist(),
        "settings": samples.settings,
    }
    top = rows[:8]
    places = [("samples", i) for i, _, _ in top] + [("training", i) for _, i, _ in top]
    pairs = torch.stack([next(sets[name].batches(1, i, i + 1))[0].cpu() for name, i in places])
    texts = [""] * len(top) + [f"{distance:.3f}" for *_, distance in top]
    write_bytes(Path(f"{out}.png"), picture(pairs, range(len(texts)), texts, columns=len(top)))
    write_json(Path(f"{out}.json"), record)
    print(f"{out}.png\n{out}.json")
