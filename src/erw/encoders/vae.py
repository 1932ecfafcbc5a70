"""P2L: images to latents and back, by a frozen VAE: shipped, by name, any folder, or none.

Latents outside this module are scaled: latent = (raw - shift) * scale, about zero mean and unit
deviation. `encode` returns the raw moments, as the cache stores them. Some VAEs leave both to the
data: mean and 1 / deviation of each channel, measured while preparing. A representation autoencoder
(RAE, arXiv 2510.11690) has the tokens of a vision encoder for latents, and scales them itself.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from erw.encoders import pretrained
from erw.encoders.base import check_images
from erw.encoders.names import SHIPPED, known
from erw.errors import CheckpointError, ConfigError, raised_as
from erw.io import load_tensors, read_json

Scaling = tuple[list[float], list[float]]  # shift and scale, one value per channel
_CONFIG, _WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
ENTRIES: dict[str, dict[str, Any]] = known("vaes")
MAPS = {"reshape_to_2d": True}  # a RAE's latents as (C, h, w)
VA_VAE: dict[str, Any] = known("va-vae")


@dataclass(frozen=True)
class VAE:
    """A frozen VAE with its latents' scaling.

    `factor`: image side over latent side. `shift` and `scale`: float32 (C, 1, 1), or None where
    they are measured on the data. `weight_hash`: SHA-256 of the weights file, "none" without one.
    `network`: of diffusers, None for plain pixels. `revision`: commit of weights from the hub.
    """

    name: str
    channels: int
    factor: int
    shift: Tensor | None
    scale: Tensor | None
    weight_hash: str
    network: Any
    revision: str | None = None
    side: int | None = None  # of images, the only one that a RAE takes and gives

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weights: Any = self.scale if self.network is None else next(self.network.parameters())
        return weights.device

    @property
    def scaling(self) -> tuple[Tensor, Tensor]:
        """Shift and scale; `ConfigError` where they are measured on data and not yet known."""
        if self.scale is None or self.shift is None:
            raise ConfigError(f"VAE {self.name} has no latent statistics: call .scaled(...)")
        return self.shift, self.scale

    def scaled(self, shift: Sequence[float], scale: Sequence[float]) -> "VAE":
        """The same with another scaling, one value per channel: what a cache has measured."""
        a, b = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (shift, scale))
        return replace(self, shift=a.to(self.device), scale=b.to(self.device))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> raw moments float32 (B, 2C, h, w): means, then deviations."""
        check_images(images)
        if self.side not in (None, side := images.shape[-1]):
            raise ConfigError(f"VAE {self.name} needs --image-size {self.side}, not {side}")
        pixels = images.to(self.device).float() / 127.5 - 1
        pixels = (pixels + 1) / 2 if self.side else pixels
        if self.network is None:
            return torch.cat([pixels, torch.zeros_like(pixels)], 1)
        return torch.cat([_moments(self.network.encode(p)) for p in _parts(pixels)]).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images uint8 (B, 3, h * factor, w * factor)."""
        shift, scale = self.scaling
        raw = latents.to(scale).div(scale).add(shift)
        if self.network is not None:
            raw = torch.cat([self.network.decode(part).sample for part in _parts(raw)])
            raw = 2 * raw - 1 if self.side else raw
        return ((raw + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()


def _moments(encoded: Any) -> Tensor:
    """Means and deviations of diffusers' output; a tiny autoencoder or RAE has no deviation."""
    if hasattr(encoded, "latent_dist"):
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], 1)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return torch.cat([latents, torch.zeros_like(latents)], 1)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """The batch in parts that stay in a CPU's cache (128 at once: half as fast), channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.split(8) if x.device.type == "cpu" else (x,)


def load_vae(name_or_path: str | Path, *, device: str = "cpu") -> VAE:
    """A VAE by one of these names.

    * "openmoji-f4c4", which comes with the package, or "none" for pixels;
    * an entry of `ENTRIES`, such as "sd-vae-ft-ema", from the hub, or ENTRY=FOLDER;
    * "va-vae=FILE", LightningDiT's checkpoint of f16d32, scaled by a `latents_stats.pt` in the same
      folder or measured;
    * a folder of an AutoencoderKL, AutoencoderTiny or AutoencoderRAE, scaled as diffusers has it.

    Raises `ConfigError` for an unknown name, `CheckpointError` for weights that do not fit.
    """
    name, revision = str(name_or_path), None
    kind, _, local = name.partition("=")
    folder = Path(name).expanduser()
    entry = None if folder.is_dir() else ENTRIES.get(kind)
    if name == "none":
        one = torch.ones(3, 1, 1, device=device)
        return VAE("none", 3, 1, torch.zeros_like(one), one, "none", None)
    if name in SHIPPED:
        folder = SHIPPED[name]
    elif local and (entry or kind == "va-vae"):
        folder = Path(local).expanduser()
    elif kind == "va-vae":
        raise CheckpointError("VA-VAE comes as a file (LightningDiT links it): va-vae=FILE")
    elif entry:
        files = [str(PurePosixPath(entry.get("subfolder", ""), x)) for x in (_CONFIG, _WEIGHTS)]
        folder = pretrained.from_hub(kind, entry["hub"], files)
        folder, revision = folder / entry.get("subfolder", ""), folder.name
    elif not folder.is_dir():
        choices = ", ".join([*SHIPPED, "none", *ENTRIES, "va-vae=FILE"])
        raise ConfigError(f"unknown VAE {name!r}: choose from {choices}, or a diffusers folder")
    network, scaling = _va_vae(folder) if kind == "va-vae" else _from_folder(folder, kind, entry)
    weights = folder if kind == "va-vae" else folder / _WEIGHTS
    with weights.open("rb") as file:
        weight_hash = hashlib.file_digest(file, "sha256").hexdigest()
    config = network.config
    levels = config.get("encoder_block_out_channels") or config.get("block_out_channels", ())
    factor = config.get("patch_size") or 2 ** (len(levels) - 1)  # the first of a RAE
    channels = config.get("latent_channels") or config["encoder_hidden_size"]
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    side = getattr(network, "decoder_image_size", None)
    vae = VAE(name, channels, factor, None, None, weight_hash, network, revision, side)
    usable = not scaling or all(0 < value < math.inf for value in scaling[1])
    if scaling and (list(map(len, scaling)) != [channels] * 2 or not usable):
        raise CheckpointError(f"{weights}: expected {channels} means and positive deviations")
    return vae.scaled(*scaling) if scaling else vae


def _check_config(model: str, config: dict[str, Any], weights: Path) -> None:
    """Raise `CheckpointError` for settings that make a network larger than its file, or one that
    does not give back an image: tried without memory, before it is built."""
    diffusers = pretrained.library_for(weights.parent, "diffusers")
    pretrained.check_sizes(weights.parent)
    size, what = weights.stat().st_size, f"{weights.parent / _CONFIG} does not fit its weights"
    wrong, meta = raised_as(CheckpointError, what), torch.device("meta")
    with wrong, meta, torch.no_grad(), pretrained.quiet(diffusers):
        network = getattr(diffusers, model).from_config(config | MAPS).eval()
        if (numbers := sum(x.numel() for x in network.parameters())) > size:
            raise ValueError(f"it has {numbers:,} numbers, the file {size:,} bytes")
        image = torch.zeros(1, 3, *[getattr(network, "decoder_image_size", 256)] * 2)
        means, _ = _moments(network.encode(image)).chunk(2, 1)
        if (made := network.decode(means).sample).shape != image.shape:
            raise ValueError(f"{tuple(image.shape)} becomes {tuple(made.shape)}")


def _from_folder(folder: Path, name: str, entry: Any) -> tuple[Any, Scaling | None]:
    """The autoencoder in float32, and its scaling, None where it is to be measured."""
    model = (settings := read_json(folder / _CONFIG)).get("_class_name")
    if model not in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderRAE"):
        raise CheckpointError(f"{folder / _CONFIG} is of a {model}: expected an AutoencoderKL")
    if folder not in SHIPPED.values():
        _check_config(model, settings, folder / _WEIGHTS)
    name = f"VAE {name if entry else folder.name}"
    options = {"strict": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    if model == "AutoencoderRAE":  # it scales its latents itself, by channel and place
        network = _rae(folder, name)
        width = network.config["encoder_hidden_size"]
        return network, ([0.0] * width, [1.0] * width)
    network = pretrained.load_complete("diffusers", model, folder, name=name, **options).float()
    with raised_as(CheckpointError, f"{folder / _CONFIG} has no scaling that can be read"):
        config, ones = network.config, [1.0] * network.config["latent_channels"]
        mean, deviation, factor = config.get("latents_mean"), config.get("latents_std"), 1.0
        if not entry:  # a folder: diffusers' meaning of the four settings
            mean = mean or [config.get("shift_factor") or 0.0] * len(ones)
            deviation, factor = deviation or ones, config["scaling_factor"]
        elif "scale" in entry:
            mean, deviation, factor = [entry["shift"]] * len(ones), ones, entry["scale"]
        if not (mean and deviation):
            return network, None
        return network, ([*map(float, mean)], [float(factor / x) for x in deviation])


def _rae(folder: Path, name: str) -> Any:
    """A RAE from diffusers' files, of which transformers has renamed some weights since."""
    with raised_as(CheckpointError, f"{name} cannot be built by diffusers with transformers"):
        from diffusers import AutoencoderRAE

        network = AutoencoderRAE.from_config(read_json(folder / _CONFIG) | MAPS).float()
    state, expected, names = {}, network.state_dict(), known("rae")["names"]
    for key, value in load_tensors(folder / _WEIGHTS)[0].items():
        for pattern, new in names.items():
            key = key if key in expected else re.sub(pattern, new, key)
        state[key] = value
    state.pop("decoder.decoder_pos_embed", None)  # computed, but in older files
    pretrained.load_exactly(network, state, f"weights of {name} ({folder})")
    return network


def _va_vae(path: Path) -> tuple[Any, Scaling | None]:
    """VA-VAE (f16d32, arXiv 2501.01423) from LightningDiT's checkpoint of CompVis' autoencoder."""
    from diffusers import AutoencoderKL

    network, state = AutoencoderKL(**VA_VAE["config"]), {}
    last = len(VA_VAE["config"]["block_out_channels"]) - 1
    for name, value in pretrained.read_state(path).items():
        if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", name):
            # The decoder's levels count backwards.
            new = re.sub(r"\bup\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", name)
            for pattern, replacement in VA_VAE["names"].items():
                new = re.sub(pattern, replacement, new)
            linear = "attentions" in new and value.ndim == 4  # a 1 x 1 convolution in CompVis
            state[new] = (value[:, :, 0, 0] if linear else value).float()
    pretrained.load_exactly(network, state, f"{path} is no VA-VAE f16d32")
    path = path.parent / "latents_stats.pt"
    if not path.is_file():
        return network, None
    stats = {"mean": Tensor(), "std": Tensor()} | pretrained.read_state(path)
    mean, deviation = stats["mean"].float().flatten(), stats["std"].float().flatten()
    return network, (mean.tolist(), (1 / deviation).tolist())
