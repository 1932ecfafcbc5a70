"""Small models to export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from erw.config import Flow, Model, Run, Sample, to_dict
from erw.models import build_model
from erw.plan import PRESETS
from erw.training.trained import Trained
from helpers.parts import vae_folder

SMALL = Model(depth=2, width=32, heads=2, patch=4, input_size=16, channels=4, num_classes=3)


DDPM = Flow(objective="ddpm")
SCALING = {"shift": [0.25, -0.5, 0.375, 0.0], "scale": [2.0, 0.5, 4.0, 1.0]}
RGB_SCALING = {"shift": [0.25, -0.5, 0.375], "scale": [2.0, 0.5, 4.0]}


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


def recipe_of(trained: Trained) -> dict[str, Any]:
    """What `erw train` writes beside a model's weights."""
    run = {"model": to_dict(trained.run)["model"], "plan": {"align": []}}
    cache: dict[str, Any] = {"identity": "0", "rows": 8, "vae": "none", "empty_classes": [1]}
    cache |= {"scaling": RGB_SCALING, "class_names": list(trained.class_names)}
    return json.loads(json.dumps({"erw": "0.2.0", "run": {}, "resolved": run, "cache": cache}))
