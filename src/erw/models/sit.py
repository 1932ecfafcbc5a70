"""SiT: a transformer over latent patches that predicts the velocity (arXiv 2401.08740).

Its options make the whole line: DiT (arXiv 2212.09748) is the same network with twice the output
channels and steps for times; LightningDiT (arXiv 2501.01423) has `rope`, `norm="rms"` and
`mlp="swiglu"`.

Shapes: B images, C latent channels, H = W latent pixels, p patch side, T = (H / p)^2 tokens, D
width.
"""

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw.errors import ConfigError
from erw.models.layers import (
    Block,
    FinalLayer,
    LabelEmbed,
    MlpKind,
    NormKind,
    PatchEmbed,
    TimeEmbed,
    init,
    zero,
)
from erw.models.positions import rope_2d, sincos_2d

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""depth, width, heads of the published sizes."""


class Tapped(NamedTuple):
    """A forward pass with taps: the velocity (None after an early stop) and hidden tokens by
    depth."""

    velocity: Tensor | None
    hidden: dict[int, Tensor]  # depth, counted from 1 -> (B, T, D)


class SiT(nn.Module):
    """Scalable interpolant transformer with adaLN-Zero and frozen sin-cos positions.

    Args:
        input_size: latent height and width, in latent pixels.
        channels: latent channels.
        patch: side of a patch.
        depth, width, heads: blocks, channels, attention heads.
        num_classes: classes; 0 for an unconditional model. The null class is `num_classes`, the
            last row of the label table.
        rope: rotary positions in attention.
        qk_norm: a norm on queries and keys, of the kind of `norm`.
        norm: "layer" without gain, or "rms" with gain.
        mlp: "gelu" of four times the width, or "swiglu" with as many weights.
        adaln_shift: False: blocks are scaled and gated by the conditioning, not shifted.
        out_channels: channels of the output; None: as the latent. DiT has twice as many: the noise,
            then the variance (see `erw.diffusion`).

    Raises:
        ConfigError: patches do not tile the latent.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        channels: int = 4,
        patch: int = 2,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        num_classes: int = 1000,
        rope: bool = False,
        qk_norm: bool = False,
        norm: NormKind = "layer",
        mlp: MlpKind = "gelu",
        adaln_shift: bool = True,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.patch, self.grid = channels, patch, grid_of(input_size, patch)
        self.out_channels = channels if out_channels is None else out_channels
        self.width, self.null_class = width, num_classes
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimeEmbed(width)
        self.y_embedder = LabelEmbed(num_classes + 1, width)
        blocks = [
            Block(width, heads, qk_norm=qk_norm, norm=norm, mlp=mlp, shift=adaln_shift)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, patch * patch * self.out_channels, norm=norm)
        self.register_buffer("pos_embed", sincos_2d(width, self.grid)[None], persistent=False)
        tables = torch.stack(rope_2d(width // heads, self.grid)) if rope else None
        self.register_buffer("rope", tables, persistent=False)
        self.apply(init)
        for block in blocks:
            zero(block.adaLN_modulation[1])
        zero(self.final_layer.adaLN_modulation[1])
        zero(self.final_layer.linear)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @overload
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        tap: tuple[int, ...],
        stop_at: int | None = None,
    ) -> Tapped: ...

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        tap: tuple[int, ...] = (),
        stop_at: int | None = None,
    ) -> Tensor | Tapped:
        """The velocity at x (B, C, H, W) and times t (B,), for labels y (B,); y None: the null
        class.

        With `tap`, depths counted from 1, the result is a `Tapped` with the tokens (B, T, D) after
        those blocks. `stop_at`: blocks after that depth and the final layer do not run.
        """
        if y is None:
            y = torch.full((len(x),), self.null_class, device=x.device)
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))  # (B, D), shared by every modulation
        h = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        hidden: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks[:stop_at], start=1):
            h = block(h, c, self.rope)
            if depth in tap:
                hidden[depth] = h
        if stop_at is not None:
            return Tapped(None, hidden)
        velocity = self._unpatchify(self.final_layer(h, c))
        return Tapped(velocity, hidden) if tap else velocity

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p * p * C) -> (B, C, H, W); within a patch the order is row, column, channel."""
        b, g, p, c = len(patches), self.grid, self.patch, self.out_channels
        image = patches.reshape(b, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(b, c, g * p, g * p)


def grid_of(input_size: int, patch: int) -> int:
    """Patches along a side of a latent; there are its square of tokens.

    Raises:
        ConfigError: patches do not tile the latent.
    """
    if input_size % patch:
        raise ConfigError(
            f"patches of {patch} do not tile a latent of {input_size} x {input_size}; "
            "choose model.patch among its divisors"
        )
    return input_size // patch
