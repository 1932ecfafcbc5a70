"""An encoder from a run of ours: what is inside its frozen network."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.config import Run, from_dict
from erw.encoders.base import Encoder
from erw.encoders.vae import load_vae
from erw.errors import CheckpointError, ConfigError, DataError, raised_as
from erw.io import load_tensors, read_json
from erw.models import build_model


class RunFeatures(Encoder):
    """Tokens h after a block of a run's EMA model, for clean latents (the VAE's mean, t = 0).

    "run:FOLDER#BLOCK": h without a class. "run:FOLDER#BLOCK:SCALE": guided by the label y,

        h(none) + SCALE (h(y) - h(none))               (Self-Transcendence, arXiv 2601.07773)

    There the teacher sees the noised latents of the student, which no cache can hold.
    "run:FOLDER#attentionBLOCK": queries and keys of the block's attention (B, T, 2 D), without a
    class, for HASTE (arXiv 2505.16792). Raises ConfigError for another form or model,
    CheckpointError for what is no whole run.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        form = re.fullmatch(r"run:(.+)#(?:(\d+)(?::(\d+\.?\d*))?|attention(\d+))", name)
        if form is None:
            expected = "expected run:FOLDER#BLOCK, #BLOCK:SCALE or #attentionBLOCK"
            raise ConfigError(f"encoder {name!r}: {expected}")
        folder, self.name, self.attention = Path(form[1]).expanduser(), name, form[4] is not None
        self.block, self.scale = int(form[2] or form[4]), float(form[3] or 0)
        with raised_as(CheckpointError, f"{folder} is no run whose features can be read"):
            recipe = read_json(folder / "recipe.json")
            run, cache = from_dict(Run, recipe["resolved"]), recipe["cache"]
            self.net: Any = build_model(run.model, outputs=run.flow.outputs)
            self.net.load_state_dict(load_tensors(folder / "ema.safetensors")[0])
            vae, scaling = load_vae(cache["vae"]), cache.get("scaling")
            self.vae = vae.scaled(**scaling) if scaling else vae
            self.class_names = tuple(cache["class_names"]) if self.scale else None
        exists = not run.model.needs_token and 1 <= self.block <= self.net.depth
        if not exists or (self.scale and not self.net.null_class):
            needs = f"block 1 to {self.net.depth}, no class tokens, classes for a scale"
            raise ConfigError(f"encoder {name!r}: expected {needs}")
        self.network = self.vae.network  # one hash for both networks
        self.dim = self.net.width * (1 + self.attention)
        self.eval().requires_grad_(False)

    def grid(self, image_size: int) -> tuple[int, int]:
        if image_size != (side := self.net.latent_shape[1] * self.vae.factor):
            raise DataError(f"{self.name} is for images of {side} px, not of {image_size}")
        return (round(self.net.tokens**0.5),) * 2

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        self.grid(images.shape[-1])
        mean = self.vae.encode(images).chunk(2, 1)[0].to(self.device)
        shift, scale = (values.to(mean) for values in self.vae.scaling)
        x = (mean - shift) * scale
        h, *guided = [self._inside(x, y) for y in ((None, labels) if self.scale else (None,))]
        return h + self.scale * (guided[0] - h) if guided else h

    def _inside(self, x: Tensor, y: Tensor | None) -> Tensor:
        block, t = (self.block,), x.new_zeros(len(x))
        if not self.attention:
            return self.net(x, t, y, tap=block, stop_at=self.block).hidden[self.block].float()
        both = self.net(x, t, y, attention=block, stop_at=self.block).attention[self.block]
        return torch.cat([x.transpose(1, 2).flatten(2) for x in both], 2).float()
