"""VA-VAE (f16d32, arXiv 2501.01423) from LightningDiT's checkpoint into diffusers' AutoencoderKL.

The file is a training checkpoint in the names of CompVis' latent diffusion. Its latents are scaled
by the mean and deviation of each channel: those of a `latents_stats.pt` in the same folder, which
LightningDiT publishes for ImageNet, or else those that are measured while a cache is prepared.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from erw.encoders.pretrained import load_exactly, read_checkpoint
from erw.errors import CheckpointError

STATS = "latents_stats.pt"
# Five levels, attention at the last one (16 x 16 for 256 px) and in the middle.
ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 32,
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def load(path: Path | None) -> tuple[Any, tuple[list[float], list[float]] | None]:
    """The network in float32, and shift and scale of its channels; None: to be measured.

    Raises `FileNotFoundError` for a missing file, `CheckpointError` for one that does not fit.
    """
    from diffusers import AutoencoderKL

    if path is None:
        raise CheckpointError(
            "weights of VA-VAE come as a file (LightningDiT links it): name it, as in va-vae=FILE"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no VA-VAE checkpoint at {path}: download it from LightningDiT")
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{path} has no state_dict: expected LightningDiT's VA-VAE file")
    network = AutoencoderKL(**ARCHITECTURE)
    levels = len(ARCHITECTURE["block_out_channels"])
    load_exactly(network, converted(state, levels=levels), f"{path} is no VA-VAE f16d32")
    stats = path.parent / STATS
    channels = ARCHITECTURE["latent_channels"]
    return network, _statistics(stats, channels) if stats.is_file() else None


def converted(checkpoint: dict[str, Any], *, levels: int) -> dict[str, Tensor]:
    """CompVis' names as diffusers': levels of the decoder count the other way round."""
    state = {}
    for name, value in checkpoint.items():
        if not name.startswith(_PARTS) or not isinstance(value, Tensor):
            continue  # losses, the foundation model that it was aligned with
        attention = re.search(r"\.(?:attn\.\d+|attn_1)\.(\w+)\.", name)
        if attention and value.ndim == 4:
            value = value[:, :, 0, 0]  # 1 x 1 convolutions that diffusers has as linear layers
        state[_renamed(name, levels)] = value.float()
    return state


def _renamed(name: str, levels: int) -> str:
    def up(match: re.Match[str]) -> str:
        return f"up_blocks.{levels - 1 - int(match[1])}"

    name = re.sub(r"(?<=decoder\.)up\.(\d+)", up, name)
    name = re.sub(r"(?<=encoder\.)down\.(\d+)", r"down_blocks.\1", name)
    name = re.sub(r"blocks\.(\d+)\.block\.(\d+)", r"blocks.\1.resnets.\2", name)
    name = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    name = name.replace(".mid.block_1.", ".mid_block.resnets.0.")
    name = name.replace(".mid.block_2.", ".mid_block.resnets.1.")
    name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    return re.sub(
        r"(attentions\.\d+)\.(\w+)\.", lambda m: f"{m[1]}.{_ATTENTION.get(m[2], m[2])}.", name
    )


def _statistics(path: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and 1 / deviation."""
    stats = read_checkpoint(path)
    try:
        mean, deviation = (stats[key].float().reshape(-1) for key in ("mean", "std"))
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has no mean and std ({error})") from error
    if len(mean) != channels or len(deviation) != channels or deviation.min() <= 0:
        raise CheckpointError(f"{path}: expected {channels} means and deviations above 0")
    return mean.tolist(), (1 / deviation).tolist()
