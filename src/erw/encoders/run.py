"""An encoder from a run of ours: tokens inside its frozen network."""

import re
from pathlib import Path
from typing import Any

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

    There the teacher sees the noised latents of the student, which no cache can hold. Raises
    ConfigError for another form or model, CheckpointError for what is no whole run.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if (form := re.fullmatch(r"run:(.+)#(\d+)(?::(\d+\.?\d*))?", name)) is None:
            raise ConfigError(f"encoder {name!r}: expected run:FOLDER#BLOCK or #BLOCK:SCALE")
        folder, self.name = Path(form[1]).expanduser(), name
        self.block, self.scale = int(form[2]), float(form[3] or 0)
        with raised_as(CheckpointError, f"{folder} is no run whose features can be read"):
            recipe = read_json(folder / "recipe.json")
            run, cache = from_dict(Run, recipe["resolved"]), recipe["cache"]
            self.net: Any = build_model(run.model, outputs=run.flow.outputs)
            self.net.load_state_dict(load_tensors(folder / "ema.safetensors")[0])
            vae, scaling = load_vae(cache["vae"]), cache.get("scaling")
            self.vae = vae.scaled(**scaling) if scaling else vae
            self.class_names = tuple(cache["class_names"]) if self.scale else None
        found = not run.model.needs_token and 1 <= self.block <= self.net.depth
        if not found or (self.scale and not self.net.null_class):
            needs = f"block 1 to {self.net.depth}, no class tokens, classes for a scale"
            raise ConfigError(f"encoder {name!r}: expected {needs}")
        self.network, self.dim = self.vae.network, self.net.width  # one hash for both networks
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
        h, *guided = [
            self.net(x, x.new_zeros(len(x)), y, tap=(self.block,), stop_at=self.block)
            .hidden[self.block].float()
            for y in ((None, labels) if self.scale else (None,))
        ]  # fmt: skip
        return h + self.scale * (guided[0] - h) if guided else h
