"""What a released file leaves unsaid: the run's settings that go with it, and its VAE."""

from pathlib import Path
from typing import Any

from erw.config import Flow, Model, Run, Sample
from erw.errors import CheckpointError
from erw.plan import PRESETS

PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}  # the peers' names for ours
VAES = {4: "sd-vae-ft-ema", 32: "va-vae"}  # by latent channels
# LightningDiT counts time the other way: timestep_shift 0.3, no guidance below 0.11, 250 points.
RELEASED = Sample(steps=249, solver="euler", shift=1 / 0.3, interval=(0.0, 0.89), guided_channels=3)


def known_run(path: object, sizes: dict[str, Any], settings: dict[str, Any], layout: str) -> Run:
    """What is known of a flow model as a run's settings.

    Raises CheckpointError for a path that is not known.
    """
    path_type = str(settings.get("path_type", "linear")).lower()
    if path_type not in PATHS:
        raise CheckpointError(f"{path} has the path {path_type!r}; known: {', '.join(PATHS)}")
    token = sizes["class_token"]
    model = Model(
        **{k: v for k, v in sizes.items() if k not in ("out_channels", "class_token")},
        class_token="denoised" if token else "none",
        class_dim=token or None,
    )
    flow = Flow(path="cosine" if PATHS[path_type] == "cosine" else "linear")
    sample = RELEASED if layout == "lightningdit" else Sample()
    return Run(
        name=Path(str(path)).stem, model=model, flow=flow, plan=PRESETS["sit"], sample=sample
    )


def vae_of(channels: int) -> str:
    """The VAE whose latents have so many channels; where there is none, words that say so."""
    return VAES.get(channels, f"a VAE of {channels} channels")
