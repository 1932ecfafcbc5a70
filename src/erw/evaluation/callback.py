"""Scores while training, of samples that the EMA model draws between two steps.

    erw.train(run, out, at=watched_steps(run, run.eval.every), evaluate=scoring(run, out))

Seeds and labels are the same each time, and every rank takes its share of them. A score is a line
of kind "eval" in `metrics.jsonl`; the EMA weights with the best one are `best.safetensors`. Neither
weights nor numbers of training depend on it.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from erw.config import Run, to_dict
from erw.data.cache import Cache
from erw.dist import World
from erw.evaluation.evaluate import Scores, evaluate
from erw.evaluation.images import reference_images
from erw.evaluation.metrics import extractors_of, metrics_of
from erw.io import save_tensors, tensor_header
from erw.log import read_metrics
from erw.sampling import generate
from erw.training.loop import Callback as Callback
from erw.training.trained import BEST, Trained

HIGHER = ("precision", "recall", "density", "coverage", "inception_score")
"""Scores that begin so are better when they are higher; all others are distances."""


def scoring(
    run: Run, out: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> Callback:
    """The callback that scores samples of the EMA model; `say` gets a text on each score.

    A step that has its line is not scored again, so a run that was killed has one line for each.
    Raises here, not after hours of training: ConfigError, CacheError, FileNotFoundError for an
    impossible metric, or missing weights, reference or cache.
    """
    options = run.eval
    extractors_of(metrics_of(options.metric), weights=options.weights)
    cache = Cache.open(run.data.cache)
    reference = reference_images(
        options.reference, cache.class_names, size=cache.image_size, count=options.reference_count
    )

    def score(step: int, model: Trained, world: World) -> Sequence[dict[str, Any]]:
        if is_written(out, "eval", step, world):
            return ()
        began = time.monotonic()
        seeds, settings = range(options.samples), to_dict(run.sample)
        scores = evaluate(
            generate(model, seeds, precision="auto", vae=options.vae, **settings),
            reference=reference,
            metric=options.metric,
            weights=options.weights,
            device=str(world.device),
            world=world,
        )
        if not world.first:
            return ()
        best = options.keep_best and keep_if_best(Path(out) / BEST, model, scores)
        how = scores.to_dict()
        line = {"kind": "eval", "values": how.pop("values"), "best": best, "how": how}
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.values.items())
        say(f"step {step}: {text} of {options.samples} samples" + ", the best so far" * best)
        return [line | {"eval_seconds": time.monotonic() - began}]

    return score


def is_written(out: str | Path, kind: str, step: int, world: World) -> bool:
    """Whether a run's `metrics.jsonl` has a line of that kind and step; the same on all ranks."""

    def look() -> bool:
        path = Path(out) / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        return any((line["kind"], line["step"]) == (kind, step) for line in lines)

    return world.broadcast(look)


def keep_if_best(path: Path, model: Trained, scores: Scores) -> bool:
    """Write the model's weights to `path` unless better ones are there; True if they are the best.

    The first score decides. Weights whose score is not comparable are replaced: results are
    comparable that differ in nothing but the values and the model that made the images.
    """
    result = json.loads(json.dumps(scores.to_dict()))
    if path.exists():
        header = tensor_header(path)
        before = json.loads(header["score"])
        name, value = next(iter(result["values"].items()))
        gain = value - before["values"].get(name, value)
        better = gain > 0 if name.startswith(HIGHER) else gain < 0
        if not better and _conditions(result) == _conditions(before):
            return int(header["step"]) == model.step
    header = {"step": str(model.step), "recipe": model.run.name, "score": json.dumps(result)}
    save_tensors(path, dict(model.net.named_parameters()), header)
    return True


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    """All that the values of a result depend on, but for the model that made the images."""
    free = {"values", "settings", "images", "images_hash"}
    free |= {"recipe", "step", "weights", "erw", "torch"}
    return {k: v for k, v in (result | (result["settings"] or {})).items() if k not in free}
