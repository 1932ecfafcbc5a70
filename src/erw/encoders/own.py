"""Encoders made of something else: any nn.Module, and the inside of a VAE."""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from erw.encoders.base import Encoder, resize
from erw.encoders.vae import VAE, load_vae
from erw.errors import ConfigError, DataError, one_line


class ModuleEncoder(Encoder):
    """Any module that maps pixels (B, 3, s, s) to (B, T, D) tokens or a (B, D, h, w) map.

    ``patch``: input pixels per token, one side; ``side``: input side, by default one token for 16
    px of image. ``mean`` and ``std`` are of pixels in 0..1. The module is frozen, in eval mode.

    Raises ``ConfigError`` for a side that is no multiple of the patch.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        dim: int,
        patch: int = 16,
        side: int | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if side is not None and side % patch:
            raise ConfigError(f"input side {side} of {name}: expected a multiple of {patch}")
        self.name, self.module = name, module
        self.dim, self.dim_pooled, self.patch, self._side = dim, 0, patch, side
        # What is not the default lies in the state: the weights' hash must tell one from another.
        for key, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            told = any(value != default for value in values)
            self.register_buffer(key, 255 * torch.tensor(values).view(-1, 1, 1), persistent=told)
        if patch != 16:
            self.register_buffer("pixels_a_token", torch.tensor(patch))
        self.eval().requires_grad_(False)

    def grid(self, image_size: int) -> tuple[int, int]:
        if self._side is None and image_size % 16:
            raise DataError(f"{self.name}: 16 does not divide images of {image_size} px: set side")
        tokens = self._side // self.patch if self._side else image_size // 16
        return tokens, tokens

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.grid(images.shape[-1])[0]
        pixels = resize(images.to(self.mean.device), tokens * self.patch)  # type: ignore[arg-type]
        out = self.module((pixels - self.mean) / self.std)  # type: ignore[operator]
        if out.ndim == 4:
            out = out.flatten(2).transpose(1, 2)
        if out.shape[1:] != (tokens**2, self.dim):
            raise DataError(
                f"{self.name} gave {tuple(out.shape[1:])} an image: expected ({tokens**2}, "
                f"{self.dim}), the patch tokens without CLS"
            )
        return out.float().contiguous()

    def train(self, mode: bool = True) -> "ModuleEncoder":
        """Stays in eval mode: a frozen teacher inside a model that is trained must not change."""
        return super().train(False)


class VaeFeatures(Encoder):
    """What the middle of a VAE's encoder sees, averaged to a token per 2 x 2 latent pixels."""

    def __init__(self, vae: VAE, *, side: int | None = None) -> None:
        super().__init__()
        network: Any = getattr(vae.network, "encoder", None)
        if not hasattr(network, "mid_block"):
            raise ConfigError(
                f"VAE {vae.name} has no features to align with: name an AutoencoderKL"
            )
        self.name = f"vae:{vae.name}" + (f"@{side}" if side else "")
        self.weight_hash = vae.weight_hash
        self.network: Any = network
        self._step, self._side = 2 * vae.factor, side
        self.dim = int(vae.network.config.block_out_channels[-1])
        self.dim_pooled = 0
        self.eval().requires_grad_(False)

    def grid(self, image_size: int) -> tuple[int, int]:
        side = self._side or image_size
        if side % self._step:
            raise DataError(
                f"{self.name} gives one token per {self._step} px, which does not divide images "
                f"of {side} px: name an input side, as in {self.name}@{16 * self._step}"
            )
        return side // self._step, side // self._step

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokens = self.grid(images.shape[-1])[0]
        device = next(self.network.parameters()).device
        x = self.network.conv_in(resize(images.to(device), tokens * self._step) / 127.5 - 1)
        for block in self.network.down_blocks:
            x = block(x)
        x = nn.functional.avg_pool2d(self.network.mid_block(x), 2)
        return x.flatten(2).transpose(1, 2).float().contiguous()

    def train(self, mode: bool = True) -> "VaeFeatures":
        """Stays in eval mode: a frozen teacher inside a model that is trained must not change."""
        return super().train(False)


def of_vae(name: str, *, side: int | None = None) -> Encoder:
    """Features of the VAE that `load_vae` knows by that name."""
    return VaeFeatures(load_vae(name), side=side)


def imported(name: str) -> Encoder:
    """MODULE:FUNCTION, called without arguments: an `Encoder` of the user's own making.

    MODULE is looked for where Python looks, then in the current folder, which is not on the path of
    a console script. Raises ``ConfigError`` if there is no such function, if it or its module
    raises anything, or if what it returns is no `Encoder`.
    """
    module, _, function = name.partition(":")
    with _current_folder():
        try:
            make: Any = getattr(importlib.import_module(module), function)
        except (Exception, SystemExit) as error:  # a user's module raises what it likes
            raise ConfigError(
                f"encoder {name!r}: {_told(error)}; expected MODULE:FUNCTION, the module installed "
                f"or in {os.getcwd()}"
            ) from error
        try:
            encoder = make()
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"encoder {name!r}: its function raised {_told(error)}; expected one that returns "
                "an encoder when called without arguments"
            ) from error
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"encoder {name!r} gave a {type(encoder).__name__}: expected an erw.encoders.Encoder, "
            "such as ModuleEncoder around your module"
        )
    return encoder


@contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder as the last one in which modules are looked for."""
    here = os.getcwd()
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have taken it out itself
            sys.path.remove(here)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
