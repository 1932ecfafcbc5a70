"""Scores while training: a few samples of the EMA model, drawn between two steps.

    erw.train(run, out, at=scored_steps(run), evaluate=scoring(run, out))

Seeds and labels are the same each time. A score is a line of kind "eval" in `metrics.jsonl`: what
training had cost by then, the values, and everything that they depend on. The EMA weights with the
best score are kept as `best.safetensors`. Training itself is not touched: neither its weights nor
its numbers depend on being watched.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erw.config import Run, to_dict
from erw.data.cache import Cache
from erw.data.sources import BUILT_IN, open_source
from erw.errors import ConfigError
from erw.evaluation.comparable import differences
from erw.evaluation.evaluate import Scores, evaluate
from erw.evaluation.inputs import Images
from erw.evaluation.metrics import metric_of
from erw.evaluation.published import REFERENCES, reference_batch
from erw.evaluation.sides import spaces_of
from erw.log import append_metrics, read_metrics
from erw.sampling import generate
from erw.sampling.preview import watched_steps
from erw.training import build, checkpoint
from erw.training.ledger import Ledger
from erw.training.trained import BEST, Trained

HIGHER = ("precision", "recall", "density", "coverage", "inception_score")
"""Scores that begin so are better when they are higher; all others are distances."""


def scored_steps(run: Run) -> tuple[int, ...]:
    """The steps after which `eval.every` asks for scores, none of them in warm-up."""
    return watched_steps(run, run.eval.every)


def scoring(
    run: Run, out: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> Callable[[int, Trained], None]:
    """What `erw.train` calls at these steps; `say` is given a line on each score.

    A step that has its line is not scored again, so that a run which was killed at any moment ends
    with one line for each.

    Raises:
        ConfigError, CacheError, FileNotFoundError: an impossible metric, or no such weights,
            reference or cache; now, not after hours of training.
    """
    metrics, how = Path(out) / "metrics.jsonl", run.eval
    asked = metric_of(list(how.metric))
    if asked.ratios:
        raise ConfigError("fdr needs validation images: leave it to erw eval, after training")
    spaces_of(asked, weights=how.weights)
    cache = Cache.open(run.data.cache)
    resolved = build.resolve(run, cache)
    cost = build.step_cost(resolved, cache)
    ledger = Ledger(resolved.plan, resolved.data.batch_size, cost, cache.encoded)
    reference = reference_images(
        how.reference, cache.class_names, size=cache.image_size, count=how.reference_count
    )

    def score(step: int, model: Trained) -> None:
        lines = read_metrics(metrics) if metrics.exists() else []
        if any(line["kind"] == "eval" and line["step"] == step for line in lines):
            return
        began = time.monotonic()
        device = str(next(model.net.parameters()).device)
        options: dict[str, Any] = to_dict(run.sample)
        drawn = generate(model, range(how.samples), **options, precision="auto", vae=how.vae)
        found = evaluate(
            drawn, reference=reference, metric=how.metric, weights=how.weights, device=device
        )
        best = how.keep_best and keep_if_best(Path(out) / BEST, model, found)
        spent = ledger.spent(step)
        made = found.to_dict()
        line = {"kind": "eval", "step": step, "images": ledger.images(step)}
        line |= {f"flops_{part}": value for part, value in spent._asdict().items()}
        line |= {"seconds": _trained_for(Path(out), step), "values": made.pop("values")}
        line |= {"best": best, "how": made, "eval_seconds": time.monotonic() - began}
        append_metrics(metrics, line)
        values = ", ".join(f"{name} {value:.4g}" for name, value in found.values.items())
        say(f"step {step}: {values} of {how.samples} samples" + ", the best so far" * best)

    return score


def keep_if_best(path: Path, model: Trained, found: Scores) -> bool:
    """Write the model's weights to `path` unless better ones are there; whether they are its.

    The first score decides. Weights kept by scores that are not comparable (another metric,
    reference or way of sampling) give way.
    """
    name, value = next(iter(found.values.items()))
    result = found.to_dict()
    if path.exists():
        told = checkpoint.header(path)
        before = json.loads(told["score"])
        known = name in before["values"] and not differences(result, before)
        if known and not better(name, value, before["values"][name]):
            return int(told["step"]) == model.step
    header = {"step": str(model.step), "recipe": model.run.name, "score": json.dumps(result)}
    checkpoint.write_beside(dict(model.net.named_parameters()), path, header=header)
    return True


def better(name: str, value: float, than: float) -> bool:
    """Whether a score is better than another of the same name."""
    return value > than if name.startswith(HIGHER) else value < than


def reference_images(
    name: str | None, class_names: tuple[str, ...], *, size: int | None, count: int
) -> Images:
    """The images to compare with: a path, a built-in set composed at that size, ADM's by name.

    Without a name, runs on the built-in images are held against the built-in test set.

    Raises:
        ConfigError: no name, and the classes are not those of the built-in images.
        FileNotFoundError: nothing at the path.
    """
    if name is None:
        from erw.data.openmoji import groups

        if class_names != tuple(groups()):
            raise ConfigError(
                "--reference (--eval.reference while training) is missing: give images that were "
                "not trained on (a folder, zip, .npz, cache with images or openmoji-test)"
            )
        name = "openmoji-test"
    if name in BUILT_IN:
        options: dict[str, Any] = {"size": size} if size else {}
        return open_source(name, count=count, **options)
    if not Path(name).exists():
        if name in REFERENCES:
            return reference_batch(name)
        raise FileNotFoundError(
            f"no reference at {name}: give a folder, zip, .npz, cache or statistics"
        )
    return name


def _trained_for(out: Path, step: int) -> float:
    """Seconds of training behind a step, from the checkpoint that is written before scoring."""
    return checkpoint.progress(checkpoint.path_of(out / "checkpoints", step)).seconds
