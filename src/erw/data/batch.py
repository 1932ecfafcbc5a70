"""What is read from a cache: rows of it, and what it says of an encoder's features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erw.data.codec import Packed, float32, unpack
from erw.data.shards import Kind


class Batch(NamedTuple):
    """Rows of a cache. mean, std: float32 (B, C, h, w), shifted and scaled; labels: int64 (B,).

    features: one float32 (B, T, D) per encoder asked for, tokens row by row. token: the class token
    (B, D) of the encoder asked for, float32. A latent is `mean + std * noise`.
    """

    mean: Tensor
    std: Tensor
    labels: Tensor
    features: tuple[Tensor, ...] = ()
    token: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same rows on another device."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def rows(self, which: slice) -> "Batch":
        """Some of the rows."""
        return self._each(lambda x: x[which])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        mean, std, labels, *features = map(
            change, (self.mean, self.std, self.labels, *self.features)
        )
        token = None if self.token is None else change(self.token)
        return Batch(mean, std, labels, tuple(features), token)


class Stored(NamedTuple):
    """Rows as they lie in the cache, a half or a quarter of the bytes of a `Batch`.

    moments: raw float16 (B, 2C, h, w), means then deviations; scale, shift: float32 (C, 1, 1).
    `packed` has the features of each encoder asked for, `token` a class token (B, D).
    """

    moments: Tensor
    scale: Tensor
    shift: Tensor
    labels: Tensor
    packed: tuple[Packed, ...] = ()
    token: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The rows on a device, which scales and unpacks them: the same numbers on any."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        mean, std = float32(move(self.moments)).chunk(2, 1)
        scale, shift = move(self.scale), move(self.shift)
        features = (Packed(move(v), None if s is None else move(s)) for v, s in self.packed)
        return Batch(
            (mean - shift).mul_(scale),
            std * scale,
            move(self.labels),
            tuple(map(unpack, features)),
            None if self.token is None else float32(move(self.token)),
        )


class FeatureSpec(NamedTuple):
    """Features of one encoder in a cache. `flops`: what one image cost, multiply-add = 2.

    `class_dim`: width of its class token, 0 where none is stored.
    """

    dim: int
    grid: tuple[int, int]
    flops: int
    weight_hash: str
    format: str
    class_dim: int = 0

    @classmethod
    def of(cls, told: dict[str, Any]) -> "FeatureSpec":
        """From a manifest's settings of the encoder."""
        told = {"class_dim": 0} | told | {"grid": tuple(told["grid"])}
        return cls(**{name: told[name] for name in cls._fields})

    @property
    def tokens(self) -> int:
        """Tokens an image."""
        return self.grid[0] * self.grid[1]

    def kind(self, what: str) -> Kind:
        """Type and shape of a row of one of its columns: "features", "scale" or "class"."""
        stored = "float8_e4m3fn" if self.format == "float8" else self.format
        kinds: dict[str, Kind] = {
            "features": (stored, (self.tokens, self.dim)),
            "scale": ("float32", (self.tokens,)),
            "class": ("float16", (self.class_dim,)),
        }
        return kinds[what]
