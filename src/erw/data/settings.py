"""The settings that make a cache what it is: written first, compared before anything is added."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from ..errors import ConfigError
from .codec import FORMATS
from .crops import CROPS
from .images import WHITE
from .rows import Networks
from .sources import Source

PRECISIONS = ("float32", "bfloat16")


def load_networks(
    vae: Any, encoders: Sequence[Any], *, features: str, precision: str, device: str
) -> Networks:
    """The frozen parts, loaded where they are given by name. `ConfigError` for impossible ones."""
    from ..encoders import load_encoder

    _choice("features", features, FORMATS)
    _choice("precision", precision, PRECISIONS)
    if isinstance(vae, str | Path):
        from ..encoders import load_vae

        vae = load_vae(str(vae), device=device)
    loaded = tuple(load_encoder(e, device=device) if isinstance(e, str) else e for e in encoders)
    names = [encoder.name for encoder in loaded]
    if len(set(names)) < len(names):
        raise ConfigError(f"the same encoder is asked for twice: {', '.join(names)}")
    return Networks(vae, loaded, features, precision, device)


def describe(
    source: Source,
    networks: Networks,
    *,
    image_size: int,
    crop: str,
    rows_per_shard: int,
    **plain: Any,
) -> dict[str, Any]:
    """All settings as JSON values; `plain` are taken as they are."""
    vae = networks.vae
    _choice("crop", crop, CROPS)
    if image_size < vae.factor or image_size % vae.factor:
        raise ConfigError(
            f"image size {image_size} is no multiple of {vae.factor}, the factor of VAE {vae.name}"
        )
    if rows_per_shard < 1:
        raise ConfigError(f"rows_per_shard is {rows_per_shard}: expected at least 1")
    side = image_size // vae.factor
    return {
        "source": {
            "name": source.name,
            "fingerprint": source.fingerprint(),
            "count": len(source),
        },
        "background": list(getattr(source, "background", WHITE)),
        "crop": crop,
        "image_size": image_size,
        "rows_per_shard": rows_per_shard,
        "precision": networks.precision,
        **plain,
        "latent_shape": [vae.channels, side, side],
        "vae": {
            "name": vae.name,
            "weight_hash": vae.weight_hash,
            "factor": vae.factor,
            "scale": _plain(vae.scale),
            "shift": _plain(vae.shift),
            "flops": _encode_flops(networks, image_size),
        },
        "encoders": [
            {
                "name": encoder.name,
                "weight_hash": weight_hash(encoder),
                "dim": encoder.dim,
                "grid": list(encoder.grid(image_size)),
                "flops": encoder.flops(image_size),
                "format": networks.format,
            }
            for encoder in networks.encoders
        ],
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings in which two caches differ, as "crop (adm, now resize)".

    FLOPs do not count, nor where the VAE lies: its weights' hash says what it is.
    """
    before, after = _flat(old), _flat(new)
    return [
        f"{key} ({before.get(key, 'none')}, now {after.get(key, 'none')})"
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key) and not key.endswith("flops") and key != "vae.name"
    ]


def weight_hash(module: Any) -> str:
    """The module's own `weight_hash`, or the blake3 of its state."""
    if known := getattr(module, "weight_hash", None):
        return known
    digest = blake3()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _encode_flops(networks: Networks, image_size: int) -> int:
    """FLOPs of encoding one image, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=networks.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        networks.vae.encode(image)
    return counter.get_total_flops()


def _choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


def _plain(value: Any) -> Any:
    """A number or a list of numbers, for JSON."""
    if isinstance(value, torch.Tensor):
        return value.reshape(-1).tolist() if value.numel() > 1 else float(value)
    return float(value) if isinstance(value, int | float) else [float(v) for v in value]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        pairs = [(item["name"], item) for item in value]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in pairs:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
