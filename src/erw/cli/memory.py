"""`erw memory`: does a model repeat its training images? The nearest of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erw import __version__
from erw.cli.eval import DRAW, images_of, model_or_none
from erw.cli.sample import Draw
from erw.cli.settings import RunOrImages, Settings, call
from erw.config import Sample
from erw.data.cache import Cache
from erw.data.sources import BUILT_IN
from erw.dist import current
from erw.encoders.registry import load_encoder
from erw.errors import ConfigError
from erw.evaluation.images import image_set, reference_images, same_resolution
from erw.evaluation.memorization import nearest_images
from erw.io import hash_tensors, write_bytes, write_json
from erw.log import Progress
from erw.sampling.preview import picture
from erw.training import Trained

COLUMNS = 8


@dataclass(frozen=True)
class Memory:
    """What samples are compared with.

    Attributes:
        training: the images that were trained on: a folder, zip, .npz, cache with images, or
            openmoji; none: the run's own cache, if it holds images.
        held_out: images that were not trained on, which say what distance is usual; none: the
            built-in test set where the training images are built in, else nothing.
        encoder: whose pooled features are compared, as erw prepare names them.
        count: how many built-in images to compose, of the training set and of the test set.
    """

    training: str | None = None
    held_out: str | None = None
    encoder: str = "efficientnet-lite2"
    count: int = 2000


def main(args: Sequence[str]) -> None:
    model = model_or_none("memory", args)
    sampler = model.run.sample if model else Sample()
    call("memory", memory, args, {"model": model}, sampler=sampler, draw=DRAW)


def memory(
    source: RunOrImages,
    how: Settings[Memory],
    sampler: Settings[Sample],
    draw: Settings[Draw],
    model: Trained | None,
    *,
    out: str | None = None,
) -> None:
    """Find the nearest training image of every sample: distances, pairs and a picture.

    Args:
        source: the folder of a run, whose samples are compared; or a folder, zip, .npz or cache of
            images.
        how: what they are compared with.
        sampler: how a run's samples are drawn.
        draw: which.
        out: write OUT.json and OUT.png, the nearest samples above their training images.
    """
    given, size = images_of(source, model, sampler, draw, how.count)
    samples = image_set(given, what="samples")
    training: Any = how.training
    if training is None:
        if model is None:
            raise ConfigError("--training is missing: the images that were trained on")
        training = Cache.open(model.run.data.cache)
    held_out = how.held_out
    if held_out is None and how.training in BUILT_IN:
        held_out = "openmoji-test"
    sets = {"samples": samples}
    for name, one in (("training", training), ("held_out", held_out)):
        if isinstance(one, str):
            one = reference_images(one, (), size=size, count=how.count)
        if one is not None:
            sets[name] = image_set(one, what=f"{name.replace('_', '-')} images")
            same_resolution(samples, sets[name], name)
    encoder = load_encoder(how.encoder, device=str(current().device))
    with Progress(
        "memory", sum(one.count or 0 for one in sets.values()), unit="images"
    ) as progress:
        near = nearest_images(
            samples,
            training=sets["training"],
            held_out=sets.get("held_out"),
            encoder=encoder,
            progress=progress.update,
        )
    distances = near.to_dict(top=64)
    for name, value in distances["samples"].items():
        usual = distances["held_out"]
        print(f"{name:<12}{value:.4f}" + (f"   held out {usual[name]:.4f}" if usual else ""))
    if near.suspicious is not None:
        print(f"{'suspicious':<12}{near.suspicious:.1%}   nearer than 99 % of held-out images")
    if out is None:
        return
    meta = {n: {"name": s.name, "hash": s.content, "count": s.count} for n, s in sets.items()}
    record = {
        **meta,
        "encoder": encoder.name,
        "encoder_weights": hash_tensors(encoder),
        "distance": "1 - cosine of pooled features",
        "nearest": distances.pop("nearest"),
        "suspicious": distances.pop("suspicious"),
        "distances": distances,
        "settings": samples.settings,
        "versions": {"erw": __version__},
    }
    nearest = record["nearest"][:COLUMNS]
    texts = [""] * len(nearest) + [f"{pair['distance']:.3f}" for pair in nearest]
    places = [(samples, pair["sample"]) for pair in nearest]
    places += [(sets["training"], pair["image"]) for pair in nearest]
    pairs = torch.stack([next(images.batches(1, i, i + 1))[0].cpu() for images, i in places])
    drawing = picture(pairs, range(len(texts)), texts, columns=len(nearest))
    write_bytes(Path(f"{out}.png"), drawing)
    write_json(Path(f"{out}.json"), record)
    print(f"{out}.png\n{out}.json")
