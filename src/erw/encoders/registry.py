"""Vision encoders by name. One more encoder is one more entry in `ENCODERS`."""

from collections.abc import Callable
from pathlib import Path

from erw.encoders import efficientnet, moco, own, vits
from erw.encoders.base import Encoder
from erw.encoders.names import HUB
from erw.encoders.run import RunFeatures
from erw.errors import ConfigError, nearest

# name -> load(name, side=, weights=); of a known family, an encoder is a line in hub.toml
ENCODERS: dict[str, Callable[..., Encoder]] = {
    **dict.fromkeys(efficientnet.TAPS, efficientnet.EfficientNetLite),
    "pixels": own.pixels,
    **dict.fromkeys(moco.SIZES, moco.MoCoV3),
    **dict.fromkeys(HUB, vits.VisionTransformer),
}


def load_encoder(name: str, *, device: str = "cpu") -> Encoder:
    """The frozen encoder `name`, in one of these forms, each with `@SIDE` to set its input.

    * an entry of `ENCODERS`, such as "dinov2-b", with weights from a package or the hub;
    * ENTRY#attentionBLOCK: queries and keys of a transformer's block, such as dinov2-b#attention9;
    * ENTRY=PATH: the same with weights from a local folder or file, without a network;
    * the path of a folder with a model of a known family, as transformers saves it;
    * "vae:NAME": the inside of a VAE;
    * "run:FOLDER#BLOCK[:SCALE]" or "run:FOLDER#attentionBLOCK" (no side): the inside of a run's
      model, see `RunFeatures`;
    * MODULE:FUNCTION (no side): an `Encoder` that your own function returns.

    Raises `ConfigError` for an unknown name, `CheckpointError` for weights that do not fit.
    """
    if name.startswith("run:"):
        return RunFeatures(name).to(device)
    if ":" in name and not name.startswith("vae:") and not Path(name).exists():
        return own.imported(name).to(device)
    entry, at, text = name.rpartition("@")
    if not at or Path(name.partition("=")[2] or name).expanduser().exists():  # a path with an @
        entry, side = name, None
    elif text.isdecimal():
        side = int(text)
    else:
        raise ConfigError(f"encoder {name!r}: expected a side in pixels after @, as in {entry}@128")
    kind, _, weights = entry.partition("=")
    kind, _, part = kind.partition("#")
    if kind in ENCODERS:
        path = Path(weights).expanduser() if weights else None
        if part:
            block = part.removeprefix("attention")
            if ENCODERS[kind] is not vits.VisionTransformer or not block.isdecimal():
                expected = "expected #attentionBLOCK of a transformer, as in dinov2-b#attention9"
                raise ConfigError(f"encoder {name!r}: {expected}")
            encoder = vits.AttentionVectors(kind, block=int(block), side=side, weights=path)
            return encoder.to(device)
        return ENCODERS[kind](kind, side=side, weights=path).to(device)
    if entry.startswith("vae:"):
        return own.VaeFeatures(entry.removeprefix("vae:"), side=side).to(device)
    if (folder := Path(entry).expanduser()).is_dir():
        return vits.VisionTransformer(None, side=side, weights=folder).to(device)
    raise ConfigError(f"no encoder or folder {name!r}{nearest(kind, ENCODERS)}")
