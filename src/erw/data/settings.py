"""The settings that make a cache what it is: written first, compared before anything is added."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from erw.data.codec import FORMATS
from erw.data.encoding import Networks
from erw.data.images import CROPS, WHITE
from erw.data.manifest import MANIFEST, SETTINGS, Manifest
from erw.data.pca import IMAGES
from erw.data.sources import Source
from erw.encoders.base import counted_flops
from erw.errors import CacheError, ConfigError

PRECISIONS = ("float32", "bfloat16")
FORMAT = "float16"
"""How features are stored where nothing else is asked for."""


def begun(out: Path) -> dict[str, Any] | None:
    """The settings with which the cache in `out` was begun, and what it was grown by; else None.

    A finished cache that lost the file has them in its manifest. Raises `CacheError` if they cannot
    be read.
    """
    path = out / SETTINGS
    try:
        if path.exists():
            return json.loads(path.read_text())
        return Manifest.read(out).settings if (out / MANIFEST).exists() else None
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}): remove {out}, prepare again") from error


def load_networks(vae: Any, encoders: Sequence[Any], *, precision: str, device: str) -> Networks:
    """The frozen parts, loaded where they are given by name. `ConfigError` for impossible ones.

    No VAE is loaded for None.
    """
    from erw.encoders import load_encoder

    _choice("precision", precision, PRECISIONS)
    if isinstance(vae, str | Path):
        from erw.encoders import load_vae

        vae = load_vae(str(vae), device=device)
    loaded = tuple(load_encoder(e, device=device) if isinstance(e, str) else e for e in encoders)
    names = [encoder.name for encoder in loaded]
    if len(set(names)) < len(names):
        raise ConfigError(f"the same encoder is asked for twice: {', '.join(names)}")
    return Networks(vae, loaded, precision, device)


def describe(
    source: Source,
    networks: Networks,
    *,
    image_size: int,
    crop: str,
    rows_per_shard: int,
    features: str | None = None,
    pca: int | None = None,
    class_token: bool = False,
    like: dict[str, Any] | None = None,
    **plain: Any,
) -> dict[str, Any]:
    """All settings as JSON values; `plain` are taken as they are.

    `features` and `pca` of None are those of the encoder in `like`, the settings of a cache.
    """
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
        "source": identity(source),
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
            **_revision(vae),
            "factor": vae.factor,
            "scale": _plain(vae.scale),
            "shift": _plain(vae.shift),
            "flops": _encode_flops(networks, image_size),
        },
        "encoders": describe_encoders(
            networks,
            image_size=image_size,
            features=features,
            pca=pca,
            class_token=class_token,
            like=like,
        ),
    }


def describe_encoders(
    networks: Networks,
    *,
    image_size: int,
    features: str | None = None,
    pca: int | None = None,
    class_token: bool = False,
    like: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The encoders' part of the settings; `class_dim` only where a class token is stored."""
    if features is not None:
        _choice("features", features, FORMATS)
    known = {told["name"]: told for told in (like or {}).get("encoders", [])}
    if class_token and not any(encoder.dim_class for encoder in networks.encoders):
        names = ", ".join(encoder.name for encoder in networks.encoders)
        raise ConfigError(
            f"class tokens are asked for, but {names or 'no encoder'} has none; name an encoder "
            "that has one, such as dinov2-b or efficientnet-lite0"
        )
    found = []
    for encoder in networks.encoders:
        before = known.get(encoder.name, {})
        kept = before.get("pca", {}).get("kept") if pca is None else pca
        if kept is not None and not 0 < kept < encoder.dim:
            raise ConfigError(
                f"pca is {kept}: expected 1 to {encoder.dim - 1}, fewer than the numbers that a "
                f"token of {encoder.name} has"
            )
        whole = bool(encoder.dim_class) and (class_token or "class_dim" in before)
        told = {
            "name": encoder.name,
            "weight_hash": weight_hash(encoder),
            **_revision(encoder),
            "dim": encoder.dim,
            "grid": list(encoder.grid(image_size)),
            "flops": encoder.flops(image_size, both=whole),
            "format": features or before.get("format", FORMAT),
        }
        if whole:
            told["class_dim"] = encoder.dim_class
        if kept is not None:
            told |= {"dim": kept, "pca": {"kept": kept, "of": encoder.dim, "images": IMAGES}}
        found.append(told)
    return found


def identity(source: Source) -> dict[str, Any]:
    """What tells a source from others."""
    return {"name": source.name, "fingerprint": source.fingerprint(), "count": len(source)}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings in which two caches differ, as "crop (adm, now resize)".

    FLOPs do not count, nor where weights come from (their hash says what they are), nor by what the
    old one was grown: compare what is given with what was there.
    """
    grown = ("appended", "class_names")
    before, after = (_flat({k: v for k, v in s.items() if k not in grown}) for s in (old, new))
    return [
        f"{key} ({before.get(key, 'none')}, now {after.get(key, 'none')})"
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key)
        and not key.endswith((".flops", ".beside", ".revision"))
        and key != "vae.name"
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
    image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=networks.device)
    return counted_flops(lambda: networks.vae.encode(image))


def _choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


def _revision(part: Any) -> dict[str, str]:
    """The commit of weights that came from the hub; nothing for others."""
    found = getattr(part, "revision", None)
    return {"revision": found} if found else {}


def _plain(value: Any) -> Any:
    """A number or a list of numbers, for JSON; None where it is measured."""
    if value is None:
        return None
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
