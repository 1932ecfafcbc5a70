"""`erw eval`: scores of a run's samples, or of images from anywhere, against a reference."""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erw.cli.sample import BUILT_IN, Draw, generation, opened, pick_device
from erw.cli.settings import Parser, add_settings, changed
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.dist import World
    from erw.training import Trained

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Score:
    """What is compared.

    Attributes:
        reference: images to compare with: a folder, zip, .npz or cache with images, statistics
            (.safetensors), the name of a reference batch of ADM's (VIRTUAL_imagenet256_labeled.npz,
            downloaded), or a built-in set; none: the built-in test set, for runs trained on the
            built-in images.
        metric: one or more, also as --metrics: fid, sfid, is, pr, kid of Inception's features; adm,
            the first four; cmmd; or fd-, fdci-, fdr-, kid-, mmd-, pr-, dc- followed by lite0,
            lite2, dinov2, inception, or any encoder.
        weights: file of the Inception network's weights; SPACE=PATH for another encoder's, such as
            dinov2=FOLDER; see docs/evaluation.md.
        validation: held-out real images, which fdr is relative to.
        reference_count: how many images of a built-in reference to compose.
    """

    reference: str | None = None
    metric: tuple[str, ...] = ("fd-lite2",)
    weights: tuple[str, ...] = ()
    validation: str | None = None
    reference_count: int = 2000


def evaluate(args: Sequence[str]) -> None:
    """Score a run's samples or a set of images; a run keeps its scores in scores.jsonl."""
    from erw.dist import world

    if args and args[0].endswith((".json", ".jsonl")):
        return compare(args)
    with world() as here:
        _evaluate(args, here)


def _evaluate(args: Sequence[str], here: World) -> None:
    what = (
        "RUN: the folder of a run, whose samples are scored; or IMAGES: a folder, zip, .npz, cache."
    )
    parser = Parser("erw eval", what, usage="RUN|IMAGES [--reference REF] [--SETTING VALUE ...]")
    parser.add_argument("--out", metavar="FILE", help="write scores and how they were made as JSON")
    parser.add_argument("--against", metavar="JSON", help="another result; warns where it differs")
    add_settings(parser, Score())
    parser.add_argument("--metrics", dest="metric", nargs="*", default=SUPPRESS, help=SUPPRESS)
    model, found = run_or_images("eval", parser, args)
    other = _result(found.against) if found.against else None
    scores = scored(args[0], model, found, here)
    if not here.first:
        return
    _print(scores, other)
    line = json.dumps(scores)
    if model is not None and Path(args[0]).is_dir():
        with (Path(args[0]) / SCORES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if found.out:
        Path(found.out).write_text(line + "\n", encoding="utf-8")


def run_or_images(verb: str, parser: Parser, args: Sequence[str]) -> tuple[Trained | None, Any]:
    """What the first of `args` names: a run, loaded, or None for images; and the options after it.

    Raises ConfigError if it is missing, FileNotFoundError if nothing is there.
    """
    from erw.config import Sample

    named = bool(args) and not args[0].startswith("-")
    if not named and not set(args) & {"-h", "--help"}:
        raise ConfigError(f"erw {verb} needs a run, or a folder, zip, .npz or cache of images")
    where = Path(args[0]) if named else Path()
    model = None
    from erw.interop import is_model

    if not named or is_model(where):
        if named:
            model = opened(args)
        add_settings(parser, model.run.sample if model and model.run else Sample())
        add_settings(parser, Draw(seeds="0:2000"))
    if not named:
        parser.parse_args(["--help"])
    elif not where.exists() and not args[0].startswith(BUILT_IN):
        raise FileNotFoundError(f"{where} is neither a run nor images; there is nothing there")
    return model, parser.read(args[1:])


def compare(args: Sequence[str]) -> None:
    """Two results side by side, with a warning that names what makes them not comparable."""
    text = "RESULT: a file of erw eval --out, or a scores.jsonl, of which the last line counts."
    parser = Parser("erw eval", text, usage="RESULT --against RESULT")
    parser.add_argument("result")
    parser.add_argument("--against", metavar="JSON", required=True, help="another result")
    found = parser.read(args)
    _print(_result(found.result), _result(found.against))


def _result(path: str) -> dict[str, Any]:
    from erw.evaluation.compare import read_result

    return read_result(path)


def _print(scores: dict[str, Any], other: dict[str, Any] | None) -> None:
    """Scores, beside another result's where there is one; what differs goes to stderr."""
    from erw.evaluation.compare import differences

    values = other["values"] if other else {}
    for name, value in scores["values"].items():
        beside = f"   against {values[name]:.4f}" if name in values else ""
        print(f"{name:<20}{value:.4f}{beside}")
    if other is None:
        return
    if not scores["values"].keys() & values.keys():
        print("warning: the two results have no score in common", file=sys.stderr)
    if found := differences(scores, other):
        print(f"warning: not comparable: {'; '.join(map(str, found))}", file=sys.stderr)


def scored(what: str, model: Trained | None, found: Any, here: World) -> dict[str, Any]:
    """The scores with everything that they depend on, as JSON values."""
    from erw.evaluation.evaluate import evaluate as score
    from erw.evaluation.images import image_set, reference_images
    from erw.log import Console, Silent

    how = changed(Score(), found)
    images, size = images_of(what, model, found, count=how.reference_count)
    names = model.class_names if model else ()
    reference = reference_images(how.reference, names, size=size, count=how.reference_count)
    validation = None
    if how.validation is not None:
        validation = reference_images(how.validation, (), size=size, count=how.reference_count)
    given, done = image_set(images), 0
    console, total = Console("eval") if here.first else Silent(), given.count or 0

    def progress(count: int) -> None:
        nonlocal done
        done += count * here.size  # the others are about as far
        console.step(min(done, total), total)

    scores = score(
        given,
        reference=reference,
        metric=how.metric,
        weights=_weights(how.weights),
        validation=validation,
        device=pick_device("auto"),
        world=here,
        progress=progress,
    )
    return scores.to_dict()


def images_of(
    what: str, model: Trained | None, found: Any, *, count: int
) -> tuple[Any, int | None]:
    """The images that were named, or a run's samples to be; and the side that a run's have."""
    if model is not None:
        images = generation(model, found, Draw(seeds="0:2000"))
        vae: Any = images.vae
        return images, model.latent_shape[-1] * vae.factor if vae else None
    if not what.startswith(BUILT_IN):
        return what, None
    from erw.evaluation.images import reference_images

    return reference_images(what, (), size=None, count=count), None


def _weights(told: tuple[str, ...]) -> dict[str, str]:
    """FILE of Inception's weights and SPACE=PATH, by space."""
    pairs = [text.partition("=") for text in told]
    return {space if path else "inception": path or space for space, _, path in pairs}
