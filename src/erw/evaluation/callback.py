"""Scores and a validation loss while training, of the EMA model between two steps.

    erw.train(run, out, at=watched_steps(run, run.eval.every), evaluate=scoring(run, out))
    erw.train(run, out, at=watched_steps(run, run.eval.loss), evaluate=validating(run, out))

Seeds, labels, noise and times are the same each time, and every rank takes its share. Neither
weights nor numbers of training depend on it. A step that has its line is not looked at again, so a
run that was killed has one line for each.
"""

import functools
import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw import flow
from erw.config import Run, to_dict
from erw.data.cache import Batch, Cache
from erw.dist import World, precision
from erw.encoders.vae import load_vae
from erw.errors import ConfigError
from erw.evaluation.evaluate import Scores, evaluate, extractors_of, metrics_of
from erw.evaluation.images import image_set, reference_images
from erw.evaluation.probing import METRICS, hidden_states, material, network_inputs, noised
from erw.io import save_tensors, tensor_header
from erw.log import read_metrics
from erw.rng import generator
from erw.sampling import generate
from erw.training import network
from erw.training.loop import Callback as Callback
from erw.training.trained import BEST, Trained

Say = Callable[[str], None]
HIGHER = ("precision", "recall", "density", "coverage", "inception_score")
"""Scores that begin so are better when they are higher; all others are distances."""
TIMES = tuple((i + 0.5) / 12 for i in range(12))
"""Noise times of the validation loss, the midpoints of twelve equal parts of [0, 1]."""


def scoring(run: Run, out: str | Path, *, say: Say = lambda text: None) -> Callback:
    """The callback that scores samples, a line of kind "eval" each; `say` gets a text on each.

    Raises here, not after hours of training: ConfigError, CacheError, FileNotFoundError for an
    impossible metric, or missing weights, reference or cache.
    """
    options = run.eval
    extractors_of(metrics_of(options.metric), weights=options.weights)
    cache = Cache.open(run.data.cache)
    reference = reference_images(
        options.reference, cache.class_names, size=cache.image_size, count=options.reference_count
    )
    fixed: Any = dict(reference=reference, metric=options.metric, weights=options.weights)

    def score(step: int, model: Trained, world: World) -> Sequence[dict[str, Any]]:
        if is_written(out, "eval", step, world):
            return ()
        began = time.monotonic()
        sampler = to_dict(run.sample) | {"precision": "auto", "vae": options.vae}
        images = generate(model, range(options.samples), **sampler)
        scores = evaluate(images, device=str(world.device), world=world, **fixed)
        if not world.first:
            return ()
        best = options.keep_best and keep_if_best(Path(out) / BEST, model, scores)
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.values.items())
        say(f"step {step}: {text} of {options.samples} samples" + ", the best so far" * best)
        meta = scores.to_dict()
        line = {"kind": "eval", "values": meta.pop("values"), "best": best, "how": meta}
        return [line | {"eval_seconds": time.monotonic() - began}]

    return score


def together(callbacks: Sequence[tuple[Collection[int], Callback]]) -> dict[str, Any]:
    """`at=` and `evaluate=` of `erw.train` for several callbacks, each with its own steps."""

    def call(step: int, model: Trained, world: World) -> list[dict[str, Any]]:
        due = [callback for steps, callback in callbacks if step in steps]
        return [line for callback in due for line in callback(step, model, world) or ()]

    return {"at": {step for steps, _ in callbacks for step in steps}, "evaluate": call}


def is_written(out: str | Path, kind: str, step: int, world: World) -> bool:
    """Whether a run's `metrics.jsonl` has a line of that kind and step; the same on all ranks."""

    path = Path(out) / "metrics.jsonl"
    lines = world.broadcast(lambda: read_metrics(path) if path.exists() else [])
    return any((line["kind"], line["step"]) == (kind, step) for line in lines)


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


def validating(run: Run, out: str | Path, *, say: Say = lambda text: None) -> Callback:
    """The callback that gives a line of kind "validation"; `say` gets a text on each.

    It is the objective's own squared error on images that are not trained on, with the class given
    and nothing dropped: `flow`, the mean, and `flow_by_time`, the loss at each of `times`. Raises
    ConfigError now where there are no held-out images, or they do not fit the run's cache.
    """
    total = run.eval.loss_images
    read = functools.cache(_held_out(run, Cache.open(run.data.cache)))  # made at the first use

    def validate(step: int, model: Trained, world: World) -> Sequence[dict[str, Any]]:
        if is_written(out, "validation", step, world):
            return ()
        rows = range(total * world.rank // world.size, total * (world.rank + 1) // world.size)
        images = read(rows, world.device) if rows else None
        sums = loss_sums(model, rows, images, device=world.device)
        losses = (world.mean(sums) * (world.size / total)).tolist()
        mean = sum(losses) / len(losses)
        if world.first:
            say(f"step {step}: validation loss {mean:.4f}")
        return [{"kind": "validation", "flow": mean, "times": TIMES, "flow_by_time": losses}]

    return validate


def probing(run: Run, out: str | Path, *, count: int) -> Callback:
    """The callback that gives a line of kind "probe": what hidden states of `count` images of the
    cache know, by the `METRICS` knn and cknna with its first encoder, after every block and
    (`probes`) after the best one. Raises CacheError now where the cache has no encoder."""
    cache = Cache.open(run.data.cache)
    cache.require(encoders=tuple(cache.features)[:1] or ("dinov2-b",))
    images = functools.cache(lambda: material(cache, count=min(count, len(cache))))

    def probe(step: int, model: Trained, world: World) -> Sequence[dict[str, Any]]:
        if is_written(out, "probe", step, world) or not world.first:
            return ()
        states = [x.double() for x in hidden_states(model, images()).values()]
        scores = {m: [METRICS[m](x, images(), 10) for x in states] for m in ("knn", "cknna")}
        best = {name: max(values) for name, values in scores.items()}
        return [{"kind": "probe", "probes": best, "by_block": scores, "encoder": images().encoder}]

    return probe


@torch.no_grad()
def loss_sums(
    model: Trained, numbers: Sequence[int], images: Batch | None, *, device: torch.device,
    batch_size: int = 64,
) -> Tensor:  # fmt: skip
    """The loss of the latents (of a DiT, of the noise in them) at each of `TIMES`, summed over
    images: float64 (12,). The noise of an image follows from its number."""
    settings, (dtype, _) = model.run.flow, precision(model.run.optim.precision, device)
    path = flow.PATHS[settings.path]
    prediction = "noise" if settings.objective == "ddpm" else settings.prediction
    sums = torch.zeros(len(TIMES), dtype=torch.float64, device=device)
    for lo in range(0, len(numbers), batch_size):
        assert images is not None, "there are images where there are numbers"
        part = slice(lo, lo + batch_size)
        batch, some = images.rows(part).to(device), numbers[part]
        latent = _normal("latent", some, batch.mean.shape[1:], 0).to(device)
        x, y = network_inputs(model.net, batch.mean + batch.std * latent, batch.labels, batch.token)
        for i, t in enumerate(TIMES):
            eps = _normal("noise", some, x.shape[1:], i).to(device)
            at = noised(settings, x, eps, torch.full((len(x),), t, device=device))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model.net(at.x_t, at.t, y)[:, : x.shape[1]].float()
                residual = flow.residual(prediction, output, x, at, path=path)
            channels = batch.mean[0].numel()
            sums[i] += residual.flatten(1)[:, :channels].double().square().mean(1).sum()
    return sums


def _normal(name: str, numbers: Sequence[int], shape: Sequence[int], time: int) -> Tensor:
    """Standard normal (B, *shape): a function of each image's number and the time's."""
    seeds = (generator(0, "validation", name, number, time) for number in numbers)
    return torch.stack([torch.randn(tuple(shape), generator=rng) for rng in seeds])


def _held_out(run: Run, cache: Cache) -> Callable[[range, torch.device], Batch]:
    """Numbers, device -> held-out images."""
    count, name = run.eval.loss_images, run.eval.heldout
    if run.model.net == "rdm":
        raise ConfigError("an rdm has no latents to validate on: leave eval.loss at 0")
    if name is None:
        names = () if run.model.needs_token else cache.class_names  # only a cache has tokens
        missing = f"eval.heldout is missing: give a cache of other images, made as {cache.address}"
        sizes = {"size": cache.image_size, "count": count}
        source: Any = reference_images(None, names, missing=missing, **sizes)

        def compose(rows: range, device: torch.device) -> Batch:
            """Built-in test images, encoded by the cache's VAE."""
            vae, images = load_vae(cache.vae["name"], device=str(device)), image_set(source)
            batches = images.batches(64, rows.start, rows.stop)
            encoded = torch.cat([vae.encode(batch) for batch in batches])
            labels = torch.from_numpy(source.labels[rows.start : rows.stop]).long()
            return Batch(*cache.scaled(encoded), labels)

        return compose
    other = Cache.open(name)
    fits = {
        "latents of another VAE": other.vae["weight_hash"] == cache.vae["weight_hash"],
        "latents of another shape": other.latent_shape == cache.latent_shape,
        "other classes": other.class_names == cache.class_names,
        f"{len(other)} images instead of {count}": len(other) >= count,
    }
    if wrong := [what for what, good in fits.items() if not good]:
        raise ConfigError(f"eval.heldout {name} has {wrong[0]}: prepare it as {cache.address}")
    token = network.token_encoder(run, cache) if run.model.needs_token else ""
    spread = np.arange(count) * len(other) // count  # a cache may be sorted by class
    other.vae = cache.vae  # a cache may have measured its own scaling
    return lambda rows, device: other.read(spread[list(rows)], token=token)
