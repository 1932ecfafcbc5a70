"""Vision encoders by name. One more encoder is one more entry in ``ENCODERS``."""

import difflib
from collections.abc import Callable

from ..errors import ConfigError
from .base import Encoder


def _efficientnet(variant: int) -> Callable[[int | None], Encoder]:
    def make(side: int | None) -> Encoder:
        from .efficientnet import EfficientNetLite

        return EfficientNetLite(variant, side=side)

    return make


# Name -> function of the input side (None: the encoder's own rule), imports left to the call.
ENCODERS: dict[str, Callable[[int | None], Encoder]] = {
    "efficientnet-lite0": _efficientnet(0),
    "efficientnet-lite2": _efficientnet(2),
}


def load_encoder(name: str, *, device: str = "cpu") -> Encoder:
    """The frozen encoder ``name``, or ``name@side`` for images resized to that side.

    Raises ``ConfigError`` for a name that is not known, with the nearest that is.
    """
    kind, _, side = name.partition("@")
    if kind not in ENCODERS:
        near = difflib.get_close_matches(kind, ENCODERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown encoder {name!r}: {hint}choose from {', '.join(ENCODERS)}")
    if "@" in name and not side.isdecimal():
        raise ConfigError(f"encoder {name!r}: expected a side in pixels after @, as in {kind}@128")
    return ENCODERS[kind](int(side) if side else None).to(device)
