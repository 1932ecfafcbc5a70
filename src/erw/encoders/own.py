"""Encoders from something else: any module, your function, the inside of a VAE, the pixels."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erw.encoders.base import Encoder, PatchEncoder, tokens_of
from erw.encoders.vae import load_vae
from erw.errors import ConfigError, DataError, one_line


class ModuleEncoder(PatchEncoder):
    """Any module that maps pixels (B, 3, s, s) to (B, T, D) tokens or a (B, D, h, w) map.

    `patch`: input pixels per token; `side`: of the input, by default one token for 16 px of image;
    `mean`, `std`: of pixels in 0..1. The module is frozen, in eval mode.
    """

    def __init__(
        self, name: str, module: nn.Module, *, dim: int, patch: int = 16, side: int | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        super().__init__(name, patch=patch, side=side)
        self.name, self.module, self.dim = name, module, dim
        self.set_pixels((mean, std))
        # What is not the default is part of the state, so that the weights' hash differs.
        if any(mean):
            self.register_buffer("mean", self.get_buffer("mean"))
        if any(value != 1 for value in std):
            self.register_buffer("std", self.get_buffer("deviation"))
        if patch != 16:
            self.register_buffer("pixels_a_token", torch.tensor(patch))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        out = self.module(self.normalised(self.resized(images)))
        out = tokens_of(out) if out.ndim == 4 else out.float().contiguous()
        expected = (self.grid(images.shape[-1])[0] ** 2, self.dim)
        if out.shape[1:] != expected:
            shape = tuple(out.shape[1:])
            raise DataError(f"{self.name} gave {shape} per image: expected {expected}, without CLS")
        return out


class VaeFeatures(PatchEncoder):
    """The middle of a VAE's encoder, averaged to one token per 2 x 2 latent pixels."""

    def __init__(self, vae_name: str, *, side: int | None = None) -> None:
        vae = load_vae(vae_name)
        network: Any = getattr(vae.network, "encoder", None)
        if not hasattr(network, "mid_block"):
            raise ConfigError(f"VAE {vae.name} has no features: name an AutoencoderKL")
        super().__init__(f"vae:{vae.name}", patch=2 * vae.factor, stride=2 * vae.factor, side=side)
        self.weight_hash, self.network = vae.weight_hash, network
        self.dim = int(vae.network.config.block_out_channels[-1])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.conv_in(self.resized(images) / 127.5 - 1)
        for block in self.network.down_blocks:
            x = block(x)
        return tokens_of(nn.functional.avg_pool2d(self.network.mid_block(x), 2))


def pixels(name: str, *, side: int | None = None, weights: Path | None = None) -> ModuleEncoder:
    """No network: a token is the 4 x 4 mean colours of its patch, in -1..1."""
    if weights is not None:
        raise ConfigError(f"{name} has no weights: leave ={weights} out")
    half, name = (0.5,) * 3, name + (f"@{side}" if side else "")
    patches = nn.PixelUnshuffle(4)
    return ModuleEncoder(name, patches, dim=48, patch=4, side=side, mean=half, std=half)


def imported(name: str) -> Encoder:
    """MODULE:FUNCTION, called without arguments: an `Encoder` of the user's own.

    MODULE is on Python's path or in the current folder, which a console script has not on its path.
    """
    module, _, function = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        encoder = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # a user's module raises what it likes
        problem = f"{type(error).__name__}: {one_line(error)}"
        hint = f"expected MODULE:FUNCTION, the module installed or in {folder}"
        raise ConfigError(f"encoder {name!r} raised {problem}; {hint}") from error
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"encoder {name!r} gave a {type(encoder).__name__}: expected an Encoder")
    return encoder
