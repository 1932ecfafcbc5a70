"""A trained model from its run folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw import flow
from erw.config import Run, from_dict
from erw.errors import CheckpointError, ConfigError
from erw.models import SiT
from erw.train.build import build_model
from erw.train.checkpoint import load_weights, paths, step_of

WEIGHTS = "ema.safetensors"
BEST = "best.safetensors"
RECIPE = "recipe.json"
NAMED = {
    "last": (WEIGHTS, "train it first (it is written with each checkpoint)"),
    "best": (BEST, "it is written by scores while training: --eval.every STEPS"),
}
"""Name of a checkpoint -> its file, and how it comes about."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with what is needed to draw images from it.

    Attributes:
        net: the transformer, in eval mode.
        run: its settings, resolved.
        vae: name or path of the VAE whose latents it makes.
        class_names: of its classes; empty: unconditional.
        step: optimiser steps behind the weights.
        scaling: shift and scale a channel of its latents, where its cache has measured them; None:
            those of the VAE.
    """

    net: SiT
    run: Run
    vae: str
    class_names: tuple[str, ...]
    step: int
    scaling: dict[str, list[float]] | None = None

    @property
    def num_classes(self) -> int:
        return self.net.null_class

    @property
    def ema(self) -> float:
        """Decay of the average that the weights are."""
        return self.run.optim.ema

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.net.grid * self.net.patch
        return self.net.channels, side, side

    def velocity(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity at latents x (B, C, h, w), times t (B,) and labels y (B,).

        Raises ConfigError for a DiT, which has none.
        """
        if self.run.flow.objective == "ddpm":
            raise ConfigError("a DiT predicts noise and has no velocity; draw it with ddpm or ddim")
        path = flow.PATHS[self.run.flow.path]
        output = self.net(x, t, y)
        return flow.velocity_from(self.run.flow.prediction, output, x, t, path=path)


def load(
    folder: str | Path, *, checkpoint: str | int = "last", device: torch.device | str = "cpu"
) -> Trained:
    """The EMA model of a run folder.

    Args:
        checkpoint: "last"; "best", by the scores taken while training; or a step that the run
            keeps a checkpoint of.

    Raises:
        CheckpointError: no run or no such weights there, or truncated or another model's.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    run = from_dict(Run, recipe["resolved"])
    net = build_model(run.model, outputs=run.flow.outputs)
    step = _fill(net, folder, str(checkpoint))
    net = net.to(device).eval().requires_grad_(False)
    cache = recipe["cache"]
    names = tuple(cache["class_names"])
    return Trained(net, run, cache["vae"], names, step, cache.get("scaling"))


def _fill(net: SiT, folder: Path, checkpoint: str) -> int:
    """Load the weights that `load` names into `net`; returns the steps behind them."""
    if checkpoint in NAMED:
        file, hint = NAMED[checkpoint]
        if not (folder / file).exists():
            raise CheckpointError(f"{folder} holds no {file}; {hint}")
        return int(load_weights(folder / file, net)["step"])
    kept = {str(step_of(path)): path for path in paths(folder / "checkpoints")}
    if checkpoint not in kept:
        raise CheckpointError(
            f"checkpoint {checkpoint!r}: {folder} keeps {', '.join([*NAMED, *kept])}; "
            "train with a larger --log.keep to keep more"
        )
    load_weights(kept[checkpoint], net, prefix="ema.model.")
    return int(checkpoint)


def read_recipe(folder: Path) -> dict[str, Any]:
    """`recipe.json` of a run folder: `erw`, `torch`, `run`, `resolved`, `cache`, `cost`.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / RECIPE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["resolved"], found["cache"]["vae"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a run folder: it has no {RECIPE}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}); train into another folder"
        ) from error
    return found
