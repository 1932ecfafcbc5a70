"""Small models to export."""

import dataclasses
import json
from pathlib import Path

import torch

from erw.config import Flow, Model, Run, Sample
from erw.models import build_model
from erw.plan import PRESETS
from erw.training.trained import Trained
from helpers.parts import vae_folder

SMALL = Model(depth=2, width=32, heads=2, patch=4, input_size=16, channels=4, num_classes=3)


DDPM = Flow(objective="ddpm")
SCALING = {"shift": [0.25, -0.5, 0.375, 0.0], "scale": [2.0, 0.5, 4.0, 1.0]}


def model(vae: str = "openmoji-f4c4", *, flow: Flow | None = None, **changes: object) -> Trained:
    """A tiny model with random weights everywhere, the zero layers too."""
    shape = dataclasses.replace(SMALL, **changes)
    sample = Sample(solver="heun" if flow != DDPM else "ddim")
    run = Run(name="small", model=shape, flow=flow or Flow(), plan=PRESETS["sit"], sample=sample)
    net = build_model(run.model, outputs=run.flow.outputs)
    rng = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data.normal_(0, 0.15, generator=rng)
    names = tuple(f"class {i}" for i in range(net.null_class))
    return Trained(net.eval().requires_grad_(False), run, vae, names, 7)


def scaled_vae(folder: Path) -> Path:
    """A VAE whose latents have a shift and scale of their own in each channel."""
    config = json.loads((vae_folder(folder) / "config.json").read_text())
    config |= {"latents_mean": SCALING["shift"], "latents_std": SCALING["scale"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
