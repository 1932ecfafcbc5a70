"""`erw eval`: scores of a run's samples, or of images from anywhere, against a reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from erw.cli.sample import Draw, generation_of, open_run
from erw.cli.settings import RunOrImages, Settings, call, first, peek
from erw.config import Sample
from erw.data.sources import BUILT_IN
from erw.dist import current, world
from erw.errors import ConfigError
from erw.evaluation.compare import differences, read_result
from erw.evaluation.evaluate import evaluate as score_images
from erw.evaluation.images import image_set, reference_images
from erw.interop import is_model
from erw.log import Progress
from erw.training import Trained

DRAW = Draw(seeds="0:2000")


@dataclass(frozen=True)
class Score:
    """What is compared.

    Attributes:
        reference: images to compare with: a folder, zip, .npz or cache with images, the name of a
            reference batch of ADM's (VIRTUAL_imagenet256_labeled.npz, downloaded), or a built-in
            set; none: the built-in test set, for runs trained on the built-in images.
        metric: one or more: fid, sfid, is, pr, kid of Inception's features; adm, the first four;
            cmmd; or fd-, fdr-, kid-, mmd-, pr-, dc- followed by lite0, lite2, dinov2,
            inception, or any encoder.
        weights: file of the Inception network's weights; SPACE=PATH for another encoder's, such as
            dinov2=FOLDER; see docs/evaluation.md.
        validation: held-out real images, which fdr is relative to.
        reference_count: how many images of a built-in reference to compose.
    """

    reference: str | None = None
    metric: Annotated[tuple[str, ...], arg(aliases=["--metrics"])] = ("fd-lite2",)
    weights: tuple[str, ...] = ()
    validation: str | None = None
    reference_count: int = 2000


def main(args: Sequence[str]) -> None:
    with world():
        model = model_or_none("eval", args)
        sampler = model.run.sample if model else Sample()
        call("eval", evaluate, args, {"model": model}, sampler=sampler, draw=DRAW)


def model_or_none(verb: str, args: Sequence[str]) -> Trained | None:
    """The model that the first argument names; None where it names images or results.

    Raises:
        ConfigError: images, with options of sampling.
        FileNotFoundError: nothing is there.
    """
    name = first(verb, args, "a run, or a folder, zip, .npz or cache of images,")
    if name is None:
        return None
    if is_model(name):
        return peek(verb, open_run, args)
    if not Path(name).exists() and name not in BUILT_IN:
        raise FileNotFoundError(f"{name} is neither a run nor images; there is nothing there")
    return None


def evaluate(
    source: RunOrImages,
    score: Settings[Score],
    sampler: Settings[Sample],
    draw: Settings[Draw],
    model: Trained | None,
    *,
    out: str | None = None,
    against: str | None = None,
) -> None:
    """Score a run's samples or a set of images; a run keeps its scores in scores.jsonl.

    Args:
        source: the folder of a run, whose samples are scored; or a folder, zip, .npz or cache of
            images; or, with --against, a result of before: a file of --out, or a scores.jsonl.
        score: what is compared.
        sampler: how a run's samples are drawn.
        draw: which.
        out: write scores and how they were made as JSON.
        against: another result; warns where it differs.
    """
    other = read_result(against) if against else None
    if source.endswith((".json", ".jsonl")):
        if other is None:
            raise ConfigError(f"{source} is a result: give another one to compare with, --against")
        print_scores(read_result(source), other)
        return
    scores = scored(images_of(source, model, sampler, draw, score.reference_count), model, score)
    if not current().first:
        return
    print_scores(scores, other)
    line = json.dumps(scores) + "\n"
    if model is not None and Path(source).is_dir():
        with (Path(source) / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
    if out:
        Path(out).write_text(line, encoding="utf-8")


def images_of(
    source: str, model: Trained | None, sampler: Sample, draw: Draw, count: int
) -> tuple[Any, int | None]:
    """The images that `source` names, or a run's samples to be, with their side in pixels."""
    if model is not None:
        generation = generation_of(model, sampler, draw)
        vae: Any = generation.vae
        return generation, model.latent_shape[-1] * vae.factor if vae else None
    if (sampler, draw) != (Sample(), DRAW):
        raise ConfigError(f"{source} is no run: leave out --seeds, --steps and the like")
    built_in = source in BUILT_IN
    return (reference_images(source, (), size=None, count=count) if built_in else source), None


def scored(images: tuple[Any, int | None], model: Trained | None, score: Score) -> dict[str, Any]:
    """The scores with everything that they depend on, as JSON values."""
    world, (samples, size), count = current(), images, score.reference_count
    names = model.class_names if model else ()
    reference = reference_images(score.reference, names, size=size, count=count)
    validation = None
    if score.validation is not None:
        validation = reference_images(score.validation, (), size=size, count=count)
    samples = image_set(samples)
    pairs = [text.rpartition("=") for text in score.weights]
    with Progress("eval", samples.count or 0, unit="images", quiet=not world.first) as progress:
        return score_images(
            samples,
            reference=reference,
            metric=score.metric,
            weights={space or "inception": path for space, _, path in pairs},
            validation=validation,
            device=str(world.device),
            world=world,
            progress=lambda count: progress.update(count * world.size),  # the others are as far
        ).to_dict()


def print_scores(scores: dict[str, Any], other: dict[str, Any] | None) -> None:
    """Print scores, with another result's where there is one; what differs goes to stderr."""
    values = other["values"] if other else {}
    for name, value in scores["values"].items():
        print(f"{name:<20}{value:.4f}" + f"   against {values.get(name, 0):.4f}" * (name in values))
    if other is None:
        return
    if not scores["values"].keys() & values.keys():
        print("warning: the two results have no score in common", file=sys.stderr)
    if different := differences(scores, other):
        print(f"warning: not comparable: {'; '.join(different)}", file=sys.stderr)
