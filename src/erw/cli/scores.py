"""`erw eval`: scores of a run's samples, or of images from anywhere, against a reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erw.cli.images import BUILT_IN, Draw, generation, opened, pick_device
from erw.cli.settings import Parser, add_settings, changed
from erw.errors import ConfigError, ErwError

if TYPE_CHECKING:
    from erw.train import Trained

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Score:
    """What is compared.

    Attributes:
        reference: images to compare with: a folder, zip or .npz, statistics (.safetensors), or a
            built-in set; none: the built-in test set, for runs trained on the built-in images.
        metric: adm (FID, sFID, Inception Score, precision, recall as ADM's evaluator), or one or
            more of fd-, kid-, pr-, dc-, each followed by lite0, lite2 or inception.
        weights: file of the Inception network's weights, for adm and inception; see
            docs/evaluation.md.
        reference_count: how many images of a built-in reference to compose.
    """

    reference: str | None = None
    metric: tuple[str, ...] = ("fd-lite2",)
    weights: str | None = None
    reference_count: int = 2000


def evaluate(args: Sequence[str]) -> None:
    """Score a run's samples or a set of images; a run keeps its scores in scores.jsonl."""
    from erw.config import Sample

    if "--self-check" in args:
        return self_check(args)
    if args and args[0].endswith((".json", ".jsonl")):
        return compare(args)
    named = bool(args) and not args[0].startswith("-")
    if not named and not set(args) & {"-h", "--help"}:
        raise ConfigError("erw eval needs a run, or a folder, zip or .npz of images")
    where = Path(args[0]) if named else Path()
    what = "RUN: the folder of a run, whose samples are scored; or IMAGES: a folder, zip or .npz."
    parser = Parser("erw eval", what, usage="RUN|IMAGES [--reference REF] [--SETTING VALUE ...]")
    parser.add_argument("--out", metavar="FILE", help="write scores and how they were made as JSON")
    parser.add_argument("--against", metavar="JSON", help="another result; warns where it differs")
    parser.add_argument("--self-check", action="store_true", help="known numbers through it all")
    add_settings(parser, Score())
    model = None
    if not named or (where / "recipe.json").is_file():
        if named:
            model = opened(args)
        add_settings(parser, model.run.sample if model else Sample())
        add_settings(parser, Draw(seeds="0:2000"))
    if not named:
        parser.parse_args(["--help"])
    elif not where.exists() and not args[0].startswith(BUILT_IN):
        raise FileNotFoundError(f"{where} is neither a run nor images; there is nothing there")
    found = parser.read(args[1:])
    other = _result(found.against) if found.against else None
    scores = scored(args[0], model, found)
    _print(scores, other)
    line = json.dumps(scores)
    if model is not None:
        with (where / SCORES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if found.out:
        Path(found.out).write_text(line + "\n", encoding="utf-8")


def compare(args: Sequence[str]) -> None:
    """Two results side by side, with a warning that names what makes them not comparable."""
    text = "RESULT: a file of erw eval --out, or a scores.jsonl, of which the last line counts."
    parser = Parser("erw eval", text, usage="RESULT --against RESULT")
    parser.add_argument("result")
    parser.add_argument("--against", metavar="JSON", required=True, help="another result")
    found = parser.read(args)
    _print(_result(found.result), _result(found.against))


def _result(path: str) -> dict[str, Any]:
    from erw.evaluate.comparable import read_result

    return read_result(path)


def _print(scores: dict[str, Any], other: dict[str, Any] | None) -> None:
    """Scores, beside another result's where there is one; what differs goes to stderr."""
    from erw.evaluate.comparable import differences

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


def self_check(args: Sequence[str]) -> None:
    """Run known numbers through the whole path. Raises ErwError where one comes out wrong."""
    parser = Parser("erw eval", "Known numbers through the whole path.", usage="--self-check")
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--weights", metavar="FILE", help="check Inception's path with these too")
    found = parser.read(args)
    from erw.evaluate.selfcheck import self_check as checks

    wrong = []
    for check in checks(weights=found.weights, device=pick_device("auto")):
        mark = "ok   " if check.passed else "WRONG"
        print(f"{mark} {check.name:<48} {check.found:.6g}, expected {check.right:.6g}")
        wrong += [] if check.passed else [check.name]
    if wrong:
        raise ErwError(f"self-check failed in: {'; '.join(wrong)}; scores of this machine are off")


def scored(what: str, model: Trained | None, found: Any) -> dict[str, Any]:
    """The scores with everything that they depend on, as JSON values."""
    from erw.evaluate import evaluate as score
    from erw.evaluate.during import reference_images
    from erw.runtime.log import Console

    how = changed(Score(), found)
    images: Any = what
    size = None
    if model is not None:
        images = generation(model, found, Draw(seeds="0:2000"))
        size = model.latent_shape[-1] * images.vae.factor if images.vae else None
    names = model.class_names if model else ()
    count = how.reference_count
    reference = reference_images(how.reference, names, size=size, count=count)
    if what.startswith(BUILT_IN):
        images = reference_images(what, (), size=None, count=count)
    console, done = Console("eval"), 0
    total = len(images) if hasattr(images, "__len__") and not isinstance(images, str) else 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if total:
            console.step(done, total)

    scores = score(
        images,
        reference=reference,
        metric=how.metric,
        weights=how.weights,
        device=pick_device("auto"),
        progress=progress,
    )
    return scores.to_dict()
