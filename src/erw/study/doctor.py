"""What looks wrong with a run, by its own model, cache and curves, and what usually causes it.

    for finding in examine("runs/mine"): print(finding)

Each check is a comparison that comes out one way whatever was trained, if nothing is wrong: latents
have a deviation near 1; a model is better at the times that it is told than at reversed ones, and
with an image's own class than with another's; the average's loss is near that of the weights. The
losses are laid beside those of a healthy run of the recipe (`CURVES`) where one is kept.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from erw.data.cache import Batch, Cache
from erw.evaluation.callback import loss_sums
from erw.io import load_tensors
from erw.study.results import read_runs
from erw.training import checkpoint
from erw.training.trained import Trained, load

CURVES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("curves.json").read_text())
"""`kind_of` a run -> `name` of its recipe, `step`, `flow` (loss of training), `grad_norm`: means
over seeds of healthy runs, by `scripts/curves.py`."""
NEAR = 0.06
"""Share by which the loss of a healthy run may differ."""


class Finding(NamedTuple):
    """What a check came to."""

    check: str
    good: bool
    text: str  # the numbers in words and, where it is not good, the usual causes

    def __str__(self) -> str:
        return f"{'ok' if self.good else 'ODD':<4}{self.check}: {self.text}"


def kind_of(run: dict[str, Any]) -> str:
    """Of the run of a recipe.json: what its losses depend on, but for data, seed and rates."""
    parts = [run[name] for name in ("model", "flow", "plan")]
    parts += [run["data"]["batch_size"], run["optim"]["name"]]
    return blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def examine(path: str | Path, *, count: int = 256) -> list[Finding]:
    """The findings of all checks on a run's folder, with `count` images of its cache. Raises as
    `erw.load`; CacheError where its cache is gone."""
    model, folder = load(path), Path(path)
    cache = Cache.open(model.run.data.cache)
    rows = np.arange(min(count, len(cache))) * len(cache) // min(count, len(cache))
    token = model.run.data.class_token or ""
    batch = cache.read(rows, token=token if model.run.model.needs_token else "")

    def loss(net: Any = None, some: Batch = batch) -> float:
        """The squared error, mean over the times of a validation loss."""
        one = model if net is None else replace(model, net=net)
        sums = loss_sums(one, [*range(len(rows))], some, device=model.device)
        return float(sums.mean()) / len(rows)

    own = loss()
    findings = [_latents(batch), _average(model, folder, own, loss)]
    if model.run.flow.objective == "flow" and not model.net.class_token:
        findings.append(_times(model, own, loss))
    if model.net.null_class:
        findings.append(_labels(batch, own, loss))
    return findings + _curves(folder)


def _latents(batch: Batch) -> Finding:
    std = float((batch.mean.var() + batch.std.square().mean()).sqrt())
    text = f"the latents that it trains on have a standard deviation of {std:.2f}, where 1 is usual"
    cause = "; the VAE's scale is missing or applied twice: look at vae.scale in manifest.json"
    good = 0.3 < std < 3  # plain pixels have 0.5
    return Finding("latents", good, text + cause * (not good))


def _average(model: Trained, folder: Path, ours: float, loss: Callable[..., float]) -> Finding:
    newest = checkpoint.paths(folder / "checkpoints")[-1]
    tensors, stem = load_tensors(newest)[0], "net.model."
    weights = {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
    raw = copy.deepcopy(model.net)
    raw.load_state_dict(weights, strict=False)  # without its tables
    theirs, decay = loss(raw), model.run.optim.ema
    text = f"loss of the average {ours:.4f}, of the weights {theirs:.4f}"
    cause = (
        f"; optim.ema {decay:g} is a mean over some {1 / max(1e-9, 1 - decay):,.0f} steps, of "
        f"{model.step:,}: take a lower one, or more steps"
    )
    good = ours < 1.1 * theirs
    return Finding("EMA", good, text + cause * (not good))


def _times(model: Trained, as_given: float, loss: Callable[..., float]) -> Finding:
    turn = model.net.register_forward_pre_hook(lambda _, x: (x[0], 1 - x[1], *x[2:]))
    turned = loss()
    turn.remove()
    text = f"loss with the times as they are {as_given:.4f}, reversed {turned:.4f}"
    cause = (
        "; it has learnt them the other way round: weights or an objective with t = 1 for data, "
        "where t = 0 is data here"
    )
    good = as_given <= turned
    return Finding("times", good, text + cause * (not good))


def _labels(batch: Batch, own: float, loss: Callable[..., float]) -> Finding:
    others = loss(None, batch._replace(labels=batch.labels.roll(len(batch.labels) // 2 + 1)))
    text = f"loss with an image's class {own:.4f}, with another image's {others:.4f}"
    cause = (
        "; classes say nothing of the images: are labels shuffled, or all alike (erw train's first "
        "lines), or the run too short to have used them?"
    )
    good = own < others * (1 - 1e-4)
    return Finding("labels", good, text + cause * (not good))


def _curves(folder: Path) -> list[Finding]:
    """The last losses beside those of a healthy run of the same recipe at the same steps."""
    (run,) = read_runs([folder])
    healthy = CURVES.get(kind_of(run.recipe["run"]))
    lines = [x for x in run.lines["train"] if healthy and "flow" in x["losses"]]
    if healthy is None or not (late := [x for x in lines if x["step"] <= healthy["step"][-1]][-8:]):
        return []
    steps = [x["step"] for x in late]
    ours, norm = fmean(x["losses"]["flow"] for x in late), fmean(x["grad_norm"] for x in late)
    theirs, usual = (
        float(np.interp(steps, healthy["step"], healthy[key]).mean())
        for key in ("flow", "grad_norm")
    )
    text = f"flow loss {ours:.4f} up to step {steps[-1]:,}, where a healthy run has {theirs:.4f}"
    if abs(ours / theirs - 1) < NEAR:
        return [Finding("curve", True, text)]
    if ours < theirs:
        cause = "other data or latents, or images seen too often"
    else:
        pairs = zip(healthy["step"], healthy["flow"], strict=True)
        then = next((step for step, value in pairs if value <= ours), 0)
        cause = (
            f"that run was there after {then:,} steps; gradients are {norm / usual:.1f} times its. "
            "Is the rate too low (larger gradients, a smooth curve) or too high (a rough one), or "
            "does another loss outweigh this one?"
        )
    return [Finding("curve", False, f"{text}; {cause}")]
