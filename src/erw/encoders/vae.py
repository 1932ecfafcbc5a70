"""P2L: images to latents and back, by a frozen VAE: shipped, by name, any folder, or none.

Latents outside this module are scaled: latent = (raw - shift) * scale, so that flow matching sees
about zero mean and unit deviation. ``encode`` gives the raw moments, as the cache stores them. Some
VAEs leave both to the data: mean and 1 / deviation of each channel, measured while preparing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erw.encoders.vae_hub import ENTRIES, fetch, refuse_others
from erw.errors import CheckpointError, ConfigError, DataError, one_line

Scaling = tuple[list[float], list[float]]
"""Shift and scale, one value a channel."""

WEIGHTS = Path(__file__).parent / "weights"
_FILE = "diffusion_pytorch_model.safetensors"
# class in diffusers -> the setting with one number of channels a level
_CLASSES = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
}


@dataclass(frozen=True)
class VAE:
    """A frozen VAE with its latents' scaling.

    ``factor``: image side over latent side. ``shift`` and ``scale``: float32 (C, 1, 1), or None
    where they are measured on the data (see ``scaled``).
    ``weight_hash``: SHA-256 of the weights file, "none" without one. ``network``: a diffusers
    ``AutoencoderKL`` or ``AutoencoderTiny``, or None for plain pixels. ``revision``: the commit of
    weights that came from the hub.
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
        """Shift and scale; ``ConfigError`` where they were left to the data and are not known."""
        if self.scale is None or self.shift is None:
            raise ConfigError(
                f"VAE {self.name} leaves the scale of its latents to the data: take the run or the "
                "cache that has measured it, or .scaled(shift, scale)"
            )
        return self.shift, self.scale

    def scaled(self, shift: Sequence[float], scale: Sequence[float]) -> "VAE":
        """The same with other scaling, one value a channel: what a cache has measured."""
        moved, spread = (torch.tensor(x, device=self.device).view(-1, 1, 1) for x in (shift, scale))
        return replace(self, shift=moved, scale=spread)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> raw moments float32 (B, 2C, h, w): means, then deviations.

        Raises ``DataError`` for images of another type or a side that ``factor`` does not divide.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(images.shape)
            raise DataError(f"images are {images.dtype} {shape}: expected uint8 (B, 3, H, W)")
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

        Raises ``DataError`` for latents of another channel count, ``ConfigError`` as ``scaling``.
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
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")))


def load_vae(name_or_path: str | Path, *, device: str = "cpu") -> VAE:
    """A VAE by one of these names.

    * "openmoji-f4c4", which comes with the package, or "none" for pixels;
    * an entry of ``vae_hub.ENTRIES``, such as "sd-vae-ft-ema", fetched from the hub once, or
      ENTRY=FOLDER to read its weights from a local folder: scaling is the entry's;
    * "va-vae=FILE", LightningDiT's checkpoint of f16d32, scaled by a ``latents_stats.pt`` beside it
      or by what is measured;
    * the folder of a diffusers AutoencoderKL or AutoencoderTiny, scaling from ``config.json``:
      ``latents_mean`` and ``latents_std`` (per channel), ``shift_factor``, ``scaling_factor``.

    Raises ``ConfigError`` for an unknown name, ``CheckpointError`` for weights that are not whole,
    not the entry's kind, or cannot be fetched.
    """
    name = str(name_or_path)
    if name == "none":
        one = torch.ones(3, 1, 1, device=device)
        return VAE("none", 3, 1, torch.zeros_like(one), one, "none", None)
    kind, _, local = name.partition("=")
    if kind == "va-vae" and not Path(name).exists():
        return _va_vae(name, local, device=device)
    entry = None if Path(name).expanduser().is_dir() else ENTRIES.get(kind)
    if entry is not None:
        folder = Path(local).expanduser() if local else fetch(name, entry.hub)
    else:
        folder = WEIGHTS / name if name in shipped() else Path(name).expanduser()
    if not folder.is_dir():
        choices = ", ".join([*shipped(), "none", *ENTRIES, "va-vae=FILE"])
        raise ConfigError(
            f"unknown VAE {name!r}: choose from {choices}, or give the folder of a diffusers "
            "AutoencoderKL (config.json and safetensors weights)"
        )
    config = _config(folder)
    if entry is not None:
        refuse_others(kind, folder, config)
    network = _network(folder, config["_class_name"])
    scaling: Scaling | None
    if entry is None:
        scaling = _scaling(folder / "config.json", config)
    elif entry.scale is None:
        scaling = _statistics(folder / "config.json", config)
    else:
        channels = config["latent_channels"]
        scaling = [entry.shift] * channels, [entry.scale] * channels
    vae = _made(name, network, scaling, _hash(folder / _FILE), device)
    if entry is None or local:
        return vae
    return replace(vae, revision=(folder.parent if entry.hub.subfolder else folder).name)


def _va_vae(name: str, local: str, *, device: str) -> VAE:
    from erw.encoders.vavae import load

    if not local:
        raise CheckpointError(
            "weights of VA-VAE come as a file (LightningDiT links it): name it, as in va-vae=FILE"
        )
    path = Path(local).expanduser()
    network, scaling = load(path)
    return _made(name, network, scaling, _hash(path), device)


def _made(name: str, network: Any, scaling: Scaling | None, weight_hash: str, device: str) -> VAE:
    config = network.config
    tiny = "encoder_block_out_channels" in config
    levels = config["encoder_block_out_channels" if tiny else "block_out_channels"]
    network = network.eval().requires_grad_(False)
    vae = VAE(
        name=name,
        channels=config["latent_channels"],
        factor=2 ** (len(levels) - 1),
        shift=None,
        scale=None,
        weight_hash=weight_hash,
        network=network.to(device, memory_format=torch.channels_last),
    )
    return vae if scaling is None else vae.scaled(*scaling)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, once it is clear that an AutoencoderKL with weights lies there."""
    for file in ("config.json", _FILE):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} has no {file}: expected a diffusers AutoencoderKL folder with "
                f"config.json and {_FILE}"
            )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder / 'config.json'} holds a {type(config).__name__}: expected a JSON object"
        )
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{folder / 'config.json'} is of a {kind}: expected an {' or '.join(_CLASSES)}"
        )
    for key in ("latent_channels", _CLASSES[kind]):
        if key not in config:
            raise CheckpointError(f"{folder / 'config.json'} has no {key}: it is not whole")
    return config


def _network(folder: Path, kind: str) -> Any:
    """The autoencoder in float32; missing or extra weights are an error, not a warning."""
    import diffusers
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is raised below
    try:
        network, info = getattr(diffusers, kind).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            ignore_mismatched_sizes=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers wraps a damaged file in many ways
        line = one_line(error, 200)
        raise CheckpointError(f"{folder / _FILE} cannot be loaded: {line}") from error
    finally:
        logging.set_verbosity(level)
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise CheckpointError(
            f"{folder / _FILE} does not match config.json: {len(wrong)} missing or extra weights, "
            f"first {wrong[0]!r}"
        )
    return network.float()


def _scaling(path: Path, config: dict[str, Any]) -> Scaling:
    """Shift and scale, one value a channel, in diffusers' meaning of the four settings."""
    channels = config["latent_channels"]
    if "scaling_factor" not in config:
        raise CheckpointError(
            f"{path} has no scaling_factor: add it (1 / deviation of the latents)"
        )
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
    deviation = config.get("latents_std") or [1.0] * channels
    _check(path, channels, shift, deviation)
    return [float(x) for x in shift], [config["scaling_factor"] / x for x in deviation]


def _statistics(path: Path, config: dict[str, Any]) -> Scaling | None:
    """Mean and 1 / deviation that the config tells, None where it does not."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if not mean or not deviation:
        return None
    _check(path, config["latent_channels"], mean, deviation)
    return [float(x) for x in mean], [1 / x for x in deviation]


def _check(path: Path, channels: int, mean: list[float], deviation: list[float]) -> None:
    if len(mean) != channels or len(deviation) != channels or min(deviation) <= 0:
        raise CheckpointError(
            f"{path}: latents_mean and latents_std need {channels} values each, deviations above 0"
        )
