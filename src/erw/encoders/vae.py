"""P2L: images to latents and back, by a frozen VAE: shipped, by name, any folder, or none.

Latents outside this module are scaled: latent = (raw - shift) * scale, so that flow matching sees
about zero mean and unit deviation. `encode` returns the raw moments, as the cache stores them. Some
VAEs leave both to the data: mean and 1 / deviation of each channel, measured while preparing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erw.encoders.base import check_images
from erw.encoders.pretrained import Hub, from_hub, load_complete, read_json
from erw.errors import CheckpointError, ConfigError, DataError

Scaling = tuple[list[float], list[float]]
"""Shift and scale, one value per channel."""

SHIPPED = Path(__file__).parent / "weights"
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CLASSES = ("AutoencoderKL", "AutoencoderTiny")


class Entry(NamedTuple):
    """A VAE by name. Shift and scale, equal for all channels, belong to the entry: for some VAEs
    they are in no config.json but in the pipeline that uses it.

    `scale` None: the latents are standardised by the mean and deviation of each channel, from
    config.json (`latents_mean`, `latents_std`; not its `scaling_factor`) or measured. `channels`:
    of the latents; `model`: class in diffusers.
    """

    hub: Hub
    scale: float | None
    shift: float = 0.0
    channels: int = 4
    model: str = "AutoencoderKL"


ENTRIES = {
    "sd-vae-ft-ema": Entry(Hub("stabilityai/sd-vae-ft-ema",
        "f04b2c4b98319346dad8c65879f680b1997b204a"), 0.18215),
    "sd-vae-ft-mse": Entry(Hub("stabilityai/sd-vae-ft-mse",
        "31f26fdeee1355a5c34592e401dd41e45d25a493"), 0.18215),
    "sdxl": Entry(Hub("stabilityai/sdxl-vae",
        "6f5909a7e596173e25d4e97b07fd19cdf9611c76"), 0.13025),
    "sd3": Entry(Hub("stabilityai/stable-diffusion-3-medium-diffusers",
        "ea42f8cef0f178587cf766dc8129abd379c90671", "vae"), 1.5305, 0.0609, channels=16),
    "flux": Entry(Hub("black-forest-labs/FLUX.1-schnell",
        "741f7c3ce8b383c54771c7003378a50191e9efe9", "vae"), 0.3611, 0.1159, channels=16),
    "taesd": Entry(Hub("madebyollin/taesd",
        "614f76814bbe30edbe2e627ace1c2234c81a2c0e"), 1.0, model="AutoencoderTiny"),
    # E2E-VAE (REPA-E, arXiv 2504.10483): SD-VAE f8d4, IN-VAE and VA-VAE f16d32, tuned end to end;
    # the newest revision at the time of download.
    "e2e-sdvae": Entry(Hub("REPA-E/e2e-sdvae-hf", None), None),
    "e2e-invae": Entry(Hub("REPA-E/e2e-invae-hf", None), None, channels=32),
    "e2e-vavae": Entry(Hub("REPA-E/e2e-vavae-hf", None), None, channels=32),
}  # fmt: skip


@dataclass(frozen=True)
class VAE:
    """A frozen VAE with its latents' scaling.

    `factor`: image side over latent side. `shift` and `scale`: float32 (C, 1, 1), or None where
    they are measured on the data (see `scaled`). `weight_hash`: SHA-256 of the weights file, "none"
    without one. `network`: a diffusers AutoencoderKL or AutoencoderTiny, None for plain pixels.
    `revision`: commit of weights from the hub.
    """

    name: str
    channels: int
    factor: int
    shift: Tensor | None
    scale: Tensor | None
    weight_hash: str
    network: Any
    revision: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        if self.network is not None:
            return next(self.network.parameters()).device
        return torch.device("cpu") if self.scale is None else self.scale.device

    @property
    def scaling(self) -> tuple[Tensor, Tensor]:
        """Shift and scale; `ConfigError` where they are measured on data and not yet known."""
        if self.scale is None or self.shift is None:
            raise ConfigError(
                f"VAE {self.name} has no latent statistics; load it from a run or cache, or call "
                ".scaled(shift, scale)"
            )
        return self.shift, self.scale

    def scaled(self, shift: Sequence[float], scale: Sequence[float]) -> "VAE":
        """The same with another scaling, one value per channel: what a cache has measured."""
        new_shift, new_scale = (
            torch.tensor(x, device=self.device).view(-1, 1, 1) for x in (shift, scale)
        )
        return replace(self, shift=new_shift, scale=new_scale)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> raw moments float32 (B, 2C, h, w): means, then deviations.

        Raises `DataError` for images of another type or a side that `factor` does not divide.
        """
        check_images(images)
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise DataError(
                f"images are {images.shape[-1]} x {images.shape[-2]}: VAE {self.name} needs sides "
                f"that {self.factor} divides"
            )
        pixels = images.to(self.device).float() / 127.5 - 1
        if self.network is None:
            return torch.cat([pixels, torch.zeros_like(pixels)], 1)
        return torch.cat([_moments(self.network.encode(p)) for p in _parts(pixels)]).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images uint8 (B, 3, h * factor, w * factor).

        Raises `DataError` for latents of another channel count, `ConfigError` as `scaling`.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            shape = tuple(latents.shape)
            raise DataError(
                f"latents are {shape}: VAE {self.name} expects (B, {self.channels}, h, w)"
            )
        shift, scale = self.scaling
        raw = latents.to(scale).div(scale).add(shift)
        if self.network is not None:
            raw = torch.cat([self.network.decode(part).sample for part in _parts(raw)])
        return ((raw + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def _moments(encoded: Any) -> Tensor:
    """Means and deviations of diffusers' output; a tiny autoencoder has no deviation."""
    if hasattr(encoded, "latent_dist"):
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], 1)
    return torch.cat([encoded.latents, torch.zeros_like(encoded.latents)], 1)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """The batch in parts that stay in a CPU's cache (128 at once: half as fast), channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.split(8) if x.device.type == "cpu" else (x,)


def shipped() -> tuple[str, ...]:
    """Names of the VAEs that come with the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


def load_vae(name_or_path: str | Path, *, device: str = "cpu") -> VAE:
    """A VAE by one of these names.

    * "openmoji-f4c4", which comes with the package, or "none" for pixels;
    * an entry of `ENTRIES`, such as "sd-vae-ft-ema", fetched from the hub once, or ENTRY=FOLDER to
      read its weights from a local folder with the entry's scaling;
    * "va-vae=FILE", LightningDiT's checkpoint of f16d32, scaled by a `latents_stats.pt` in the same
      folder or by measured statistics;
    * the folder of a diffusers AutoencoderKL or AutoencoderTiny, scaling from `config.json`:
      `latents_mean` and `latents_std` (per channel), `shift_factor`, `scaling_factor`.

    Raises `ConfigError` for an unknown name, `CheckpointError` for weights that are incomplete, not
    the entry's kind, or cannot be fetched.
    """
    name = str(name_or_path)
    kind, _, local = name.partition("=")
    if name == "none":
        one = torch.ones(3, 1, 1, device=device)
        return VAE("none", 3, 1, torch.zeros_like(one), one, "none", None)
    if kind == "va-vae" and not Path(name).exists():
        from erw.encoders.vavae import load

        path = Path(local).expanduser()
        network, scaling = load(path if local else None)
        return _vae(name, network, scaling, path, device)
    entry = None if Path(name).expanduser().is_dir() else ENTRIES.get(kind)
    revision = None
    if entry is None:
        folder = SHIPPED / name if name in shipped() else Path(name).expanduser()
    elif local:
        folder = Path(local).expanduser()
    else:
        folder = from_hub(kind, entry.hub, (_CONFIG, _WEIGHTS))
        revision = (folder.parent if entry.hub.subfolder else folder).name
    if not folder.is_dir():
        choices = ", ".join([*shipped(), "none", *ENTRIES, "va-vae=FILE"])
        raise ConfigError(
            f"unknown VAE {name!r}: choose from {choices}, or give the folder of a diffusers "
            "AutoencoderKL (config.json and safetensors weights)"
        )
    network, scaling = _from_folder(folder, kind, entry)
    return replace(_vae(name, network, scaling, folder / _WEIGHTS, device), revision=revision)


def _vae(name: str, network: Any, scaling: Scaling | None, weights: Path, device: str) -> VAE:
    with weights.open("rb") as file:
        weight_hash = hashlib.file_digest(file, "sha256").hexdigest()
    config = network.config
    levels = config.get("encoder_block_out_channels") or config["block_out_channels"]
    vae = VAE(
        name=name,
        channels=config["latent_channels"],
        factor=2 ** (len(levels) - 1),
        shift=None,
        scale=None,
        weight_hash=weight_hash,
        network=network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last),
    )
    return vae if scaling is None else vae.scaled(*scaling)


def _from_folder(folder: Path, name: str, entry: Entry | None) -> tuple[Any, Scaling | None]:
    """The autoencoder in float32, and its scaling, None where it is to be measured."""
    import diffusers
    from diffusers.utils import logging

    path = folder / _CONFIG
    config = read_json(path)
    model, channels = config.get("_class_name"), config.get("latent_channels")
    if model not in CLASSES:
        raise CheckpointError(f"{path} is of a {model}: expected an {' or '.join(CLASSES)}")
    # Another VAE than the entry's would get a scaling that does not belong to its latents.
    if entry is not None and (model, channels) != (entry.model, entry.channels):
        raise CheckpointError(
            f"{path} is of an {model} of {channels} latent channels; VAE {name} is an "
            f"{entry.model} of {entry.channels} latent channels: name its own folder, or this one "
            f"without {name}="
        )
    network = load_complete(
        getattr(diffusers, model),
        folder,
        name=f"VAE {name if entry else folder.name}",
        logging=logging,
        strict=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        ignore_mismatched_sizes=False,
    )
    return network.float(), _scaling(path, config, entry)


def _scaling(path: Path, config: dict[str, Any], entry: Entry | None) -> Scaling | None:
    """Shift and scale per channel: the entry's, or config.json's; None where they are measured."""
    channels = config["latent_channels"]
    if entry is not None and entry.scale is not None:
        return [entry.shift] * channels, [entry.scale] * channels
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    factor = 1.0
    if entry is None:  # a folder: diffusers' meaning of the four settings
        if "scaling_factor" not in config:
            raise CheckpointError(
                f"{path} has no scaling_factor: add it (1 / deviation of the latents)"
            )
        factor = config["scaling_factor"]
        mean = mean or [config.get("shift_factor") or 0.0] * channels
        deviation = deviation or [1.0] * channels
    if not mean or not deviation:
        return None
    if len(mean) != channels or len(deviation) != channels or min(deviation) <= 0:
        raise CheckpointError(
            f"{path}: latents_mean and latents_std need {channels} values each, deviations above 0"
        )
    return [float(x) for x in mean], [factor / x for x in deviation]
