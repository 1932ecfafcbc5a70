"""Vision encoders by name. One more encoder is one more entry in `ENCODERS`."""

import difflib
from pathlib import Path
from typing import Protocol

from erw.encoders import convnext, efficientnet, moco, own, vits
from erw.encoders.base import Encoder
from erw.errors import ConfigError


class Load(Protocol):
    """Loads an entry. `side`: of its input, None for its own rule; `weights`: a local path."""

    def __call__(self, name: str, *, side: int | None, weights: Path | None) -> Encoder: ...


# Of a family that is known, an encoder is a line in that family's own table (`vits.HUB`).
ENCODERS: dict[str, Load] = {
    **dict.fromkeys(efficientnet.NAMES, efficientnet.load),
    **dict.fromkeys(vits.HUB, vits.load),
    **dict.fromkeys(convnext.HUB, convnext.load),
    **dict.fromkeys(moco.SIZES, moco.load),
}


def load_encoder(name: str, *, device: str = "cpu") -> Encoder:
    """The frozen encoder `name`, in one of these forms, each with `@SIDE` to set its input.

    * an entry of `ENCODERS`, such as "dinov2-b", with weights from a package or the hub;
    * ENTRY=PATH: the same with weights from a local folder or file, without a network;
    * the path of a folder with a model of a known family, as transformers saves it;
    * "vae:NAME": the inside of a VAE;
    * MODULE:FUNCTION (no side): an `Encoder` that your own function returns.

    Raises `ConfigError` for an unknown name, with the nearest known one, `CheckpointError` where
    weights are missing or damaged.
    """
    if ":" in name and not name.startswith("vae:") and not Path(name).exists():
        return own.imported(name).to(device)
    entry, side = _split(name)
    kind, _, weights = entry.partition("=")
    if kind in ENCODERS:
        path = Path(weights).expanduser() if weights else None
        return ENCODERS[kind](kind, side=side, weights=path).to(device)
    if entry.startswith("vae:"):
        return own.VaeFeatures(entry.removeprefix("vae:"), side=side).to(device)
    if (folder := Path(entry).expanduser()).is_dir():
        return vits.load_folder(folder, side=side).to(device)
    near = difflib.get_close_matches(kind, ENCODERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"unknown encoder {name!r}: {hint}choose from {', '.join(ENCODERS)}, or name a folder"
    )


def _split(name: str) -> tuple[str, int | None]:
    """Entry and side of ENTRY@SIDE; a path may contain an @ of its own."""
    entry, at, side = name.rpartition("@")
    if not at or Path(name.partition("=")[2] or name).expanduser().exists():
        return name, None
    if not side.isdecimal():
        raise ConfigError(f"encoder {name!r}: expected a side in pixels after @, as in {entry}@128")
    return entry, int(side)
