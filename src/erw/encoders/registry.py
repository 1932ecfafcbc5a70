"""Vision encoders by name. One more encoder is one more entry in ``ENCODERS``."""

import difflib
from pathlib import Path
from typing import Protocol

from erw.encoders.base import Encoder
from erw.errors import ConfigError


class Make(Protocol):
    """Builds an entry. ``side``: of its input, None for its own rule; ``weights``: local ones."""

    def __call__(
        self, name: str, *, side: int | None = None, weights: Path | None = None
    ) -> Encoder: ...


def _efficientnet(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    from erw.encoders.efficientnet import EfficientNetLite

    if weights is not None:
        raise ConfigError(f"{name} comes with its weights: leave ={weights} out")
    return EfficientNetLite(int(name[-1]), side=side)


def _vit(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    from erw.encoders.vits import load

    return load(name, side=side, weights=weights)


def _moco(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    from erw.encoders.moco import load

    return load(name, side=side, weights=weights)


def _convnext(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
    from erw.encoders.convnext import load

    return load(name, side=side, weights=weights)


# Imports are left to the call: names must be cheap to list.
ENCODERS: dict[str, Make] = {
    "efficientnet-lite0": _efficientnet,
    "efficientnet-lite2": _efficientnet,
    "dinov2-s": _vit,
    "dinov2-b": _vit,
    "dinov2-l": _vit,
    "dinov2-g": _vit,
    "dinov2-s-reg": _vit,
    "dinov2-b-reg": _vit,
    "dinov2-l-reg": _vit,
    "dinov2-g-reg": _vit,
    "dino-b": _vit,
    "dinov3-s": _vit,
    "dinov3-b": _vit,
    "dinov3-l": _vit,
    "clip-l": _vit,
    "clip-l-336": _vit,
    "convnextv2-b": _convnext,
    "siglip2-b": _vit,
    "siglip2-l": _vit,
    "siglip2-so400m": _vit,
    "mae-l": _vit,
    "ijepa-h": _vit,
    "mocov3-b": _moco,
    "mocov3-l": _moco,
}


def load_encoder(name: str, *, device: str = "cpu") -> Encoder:
    """The frozen encoder ``name``, in one of these forms, each with ``@SIDE`` to set its input.

    * an entry of ``ENCODERS``, such as "dinov2-b", with weights from a package or the hub;
    * ENTRY=PATH: the same with weights from a local folder or file, without a network;
    * the path of a folder with a model of a known family, as transformers saves it;
    * "vae:NAME": the inside of a VAE;
    * MODULE:FUNCTION (no side): an `Encoder` that your own function returns.

    Raises ``ConfigError`` for a name that is not known, with the nearest that is,
    ``CheckpointError`` where weights are missing or damaged.
    """
    if ":" in name and not name.startswith("vae:") and not Path(name).exists():
        from erw.encoders.own import imported

        return imported(name).to(device)
    entry, side = _split(name)
    kind, _, weights = entry.partition("=")
    if kind in ENCODERS:
        path = Path(weights).expanduser() if weights else None
        return ENCODERS[kind](kind, side=side, weights=path).to(device)
    if entry.startswith("vae:"):
        from erw.encoders.own import of_vae

        return of_vae(entry.removeprefix("vae:"), side=side).to(device)
    if Path(entry).expanduser().is_dir():
        from erw.encoders.vits import load_folder

        return load_folder(Path(entry).expanduser(), side=side).to(device)
    near = difflib.get_close_matches(kind, ENCODERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"unknown encoder {name!r}: {hint}choose from {', '.join(ENCODERS)}, or name a folder"
    )


def _split(name: str) -> tuple[str, int | None]:
    """Entry and side of ENTRY@SIDE; a path may hold an @ of its own."""
    entry, at, side = name.rpartition("@")
    if not at or Path(name.partition("=")[2] or name).expanduser().exists():
        return name, None
    if not side.isdecimal():
        raise ConfigError(f"encoder {name!r}: expected a side in pixels after @, as in {entry}@128")
    return entry, int(side)
