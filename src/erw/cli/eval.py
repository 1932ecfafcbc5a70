"""`erw eval`: scores of a run's samples, or of images from anywhere, against a reference."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from erw import training
from erw.cli.sample import Draw, generation_of
from erw.cli.settings import RunOrImages, Settings
from erw.errors import ConfigError
from erw.io import write_text
from erw.log import Progress

DRAW = Draw(seeds="0:2000")


@dataclass(frozen=True)
class Score:
    """What is compared."""

    # Images: a folder, zip, .npz (such as ADM's reference batches), cache with images or built-in
    # set; none: built-in test images, for runs trained on such.
    reference: str | None = None
    # fid, sfid, is, pr, kid of Inception's features; adm, the first four; cmmd; or fd-, kid-,
    # mmd-, pr-, dc- followed by lite0, lite2, dinov2, inception, or any encoder.
    metric: Annotated[tuple[str, ...], arg(aliases=["--metrics"])] = ("fd-lite2",)
    weights: str | None = None  # file of Inception's
    reference_count: int = 2000  # how many images of a built-in reference to compose


def evaluate(
    source: RunOrImages,
    score: Settings[Score],
    draw: Settings[Draw] = DRAW,
    *,
    model: "training.Trained | None" = None,
    out: str | None = None,
) -> None:
    """Score a run's samples or a set of images; a run keeps its scores in scores.jsonl.

    Args:
        source: the folder of a run, whose samples are scored; or a folder, zip, .npz or cache of
            images.
        out: write scores and how they were made as JSON.
    """
    from erw.dist import current
    from erw.evaluation.evaluate import evaluate as score_images
    from erw.evaluation.images import reference_images

    if out and Path(out).is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file in it, such as scores.json")
    world, names = current(), model.class_names if model else ()
    samples = samples_of(source, model, draw, score.reference_count)
    reference = reference_images(
        score.reference, names, size=samples.resolution[0], count=score.reference_count
    )
    with Progress("eval", samples.count, unit="images", quiet=not world.first) as progress:
        scores = score_images(
            samples,
            reference=reference,
            metric=score.metric,
            weights=score.weights,
            device=str(world.device),
            world=world,
            progress=lambda count: progress.update(count * world.size),  # the others are as far
        )
    if not world.first:
        return
    for name, value in scores.values.items():
        print(f"{name:<20}{value:.4f}")
    line = json.dumps(scores.to_dict()) + "\n"
    if model is not None and Path(source).is_dir():
        with (Path(source) / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
    if out:
        write_text(Path(out), line)


def samples_of(source: str, model: "training.Trained | None", draw: Draw, count: int) -> Any:
    """The `ImageSet` that `source` names, or a run's samples to be."""
    from erw.evaluation.images import image_set, reference_images

    if model is not None:
        return image_set(generation_of(model, draw), what="samples")
    if draw != DRAW:
        raise ConfigError(f"{source} is no run: leave out --seeds, --steps and the like")
    images = reference_images(source, (), size=None, count=count)
    return image_set(images, what="samples")
