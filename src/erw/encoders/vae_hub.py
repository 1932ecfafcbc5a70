"""VAEs by name: which weights, and the shift and scale of their latents.

Shift and scale belong to the entry and not to config.json, which for some has the first only in the
pipeline that uses it. latent = (raw - shift) * scale.
"""

from pathlib import Path
from typing import Any, NamedTuple

from erw.encoders.pretrained import Hub
from erw.errors import CheckpointError, one_line

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


class Entry(NamedTuple):
    """``hub``: a folder as diffusers saves it; shift and scale are the same for all channels.

    ``scale`` None: by the mean and deviation of each channel, those that config.json tells
    (``latents_mean``, ``latents_std``; its ``scaling_factor`` has no part in it) or measured ones.
    ``model``: its class in diffusers; ``channels``: of its latents, None where any will do.
    """

    hub: Hub
    scale: float | None
    shift: float = 0.0
    channels: int | None = None
    model: str = "AutoencoderKL"


ENTRIES = {
    "sd-vae-ft-ema": Entry(
        Hub("stabilityai/sd-vae-ft-ema", "f04b2c4b98319346dad8c65879f680b1997b204a"),
        0.18215,
        channels=4,
    ),
    "sd-vae-ft-mse": Entry(
        Hub("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"),
        0.18215,
        channels=4,
    ),
    "sdxl": Entry(
        Hub("stabilityai/sdxl-vae", "6f5909a7e596173e25d4e97b07fd19cdf9611c76"), 0.13025, channels=4
    ),
    "sd3": Entry(
        Hub(
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "ea42f8cef0f178587cf766dc8129abd379c90671",
            "vae",
        ),
        1.5305,
        0.0609,
        channels=16,
    ),
    "flux": Entry(
        Hub("black-forest-labs/FLUX.1-schnell", "741f7c3ce8b383c54771c7003378a50191e9efe9", "vae"),
        0.3611,
        0.1159,
        channels=16,
    ),
    "taesd": Entry(
        Hub("madebyollin/taesd", "614f76814bbe30edbe2e627ace1c2234c81a2c0e"),
        1.0,
        channels=4,
        model="AutoencoderTiny",
    ),
    # E2E-VAE (REPA-E, arXiv 2504.10483): SD-VAE f8d4, IN-VAE and VA-VAE f16d32, tuned end to end. A
    # revision of None: the newest at the time of download. Where nothing but the class is checked,
    # latents are scaled by statistics, one a channel, and not by numbers that fit one VAE alone.
    "e2e-sdvae": Entry(Hub("REPA-E/e2e-sdvae-hf", None), None, channels=4),
    "e2e-invae": Entry(Hub("REPA-E/e2e-invae-hf", None), None, channels=32),
    "e2e-vavae": Entry(Hub("REPA-E/e2e-vavae-hf", None), None, channels=32),
}


def fetch(name: str, hub: Hub) -> Path:
    """The folder of an entry in the hub's local cache, downloaded if it is not there yet.

    Raises ``CheckpointError`` if it is not there and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    inside = f"{hub.subfolder}/" if hub.subfolder else ""
    try:
        root = snapshot_download(
            hub.repo,
            revision=hub.revision,
            allow_patterns=[f"{inside}{CONFIG}", f"{inside}{WEIGHTS}"],
        )
    except Exception as error:  # network, gate and disk come as many types
        line = one_line(error)
        raise CheckpointError(
            f"weights of VAE {name} ({hub.repo} on the Hugging Face hub) cannot be fetched: {line}"
            f"; connect and log in where it asks so, or name a local folder: {name}=FOLDER"
        ) from error
    return Path(root) / hub.subfolder


def refuse_others(name: str, folder: Path, config: dict[str, Any]) -> None:
    """``CheckpointError`` if config.json tells another class or channel count than the entry's.

    The entry's shift and scale would be applied to latents that they do not belong to.
    """
    entry, model, channels = ENTRIES[name], config["_class_name"], config["latent_channels"]
    if model == entry.model and entry.channels in (None, channels):
        return
    wanted = entry.model + (f" of {entry.channels} latent channels" if entry.channels else "")
    raise CheckpointError(
        f"{folder / CONFIG} is of an {model} of {channels} latent channels; VAE {name} is an "
        f"{wanted}: name its own folder, or this one without {name}="
    )
