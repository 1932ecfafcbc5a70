"""SiT: a transformer over latent patches that predicts the velocity (arXiv 2401.08740).

Its options make the whole line: DiT (arXiv 2212.09748) is the same network with twice the output
channels and steps for times; LightningDiT (arXiv 2501.01423) has `rope`, `norm="rms"` and
`mlp="swiglu"`; REG (arXiv 2507.01467) has `class_token`; RCG (arXiv 2312.03701) conditions on a
`representation` in place of the class.

Shapes: B images, C latent channels, H = W latent pixels, p patch side, T = (H / p)^2 tokens, D
width, R channels of the class token or representation.
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
    RepresentationEmbed,
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
    hidden: dict[int, Tensor]  # depth, counted from 1 -> (B, T, D); class token first, if any


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
            then the variance (see `erw.ddpm`).
        class_token: channels of a class token that is denoised beside the latents, 0 for none. The
            state x and its velocity are then rows (B, C H W + R), see `join` and `split`.
        representation: channels of a representation (B, R) that y is then, in place of labels;
            zeros, or None, stand for none. 0: y are labels.

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
        class_token: int = 0,
        representation: int = 0,
    ) -> None:
        super().__init__()
        self.channels, self.patch, self.grid = channels, patch, grid_of(input_size, patch)
        self.out_channels = channels if out_channels is None else out_channels
        self.width, self.null_class = width, 0 if representation else num_classes
        self.class_token, self.representation = class_token, representation
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimeEmbed(width)
        self.y_embedder: nn.Module = LabelEmbed(num_classes + 1, width)
        if representation:
            self.y_embedder = RepresentationEmbed(representation, width)
        if class_token:  # names as in REG's files
            self.cls_projectors2 = nn.Linear(class_token, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
        blocks = [
            Block(width, heads, qk_norm=qk_norm, norm=norm, mlp=mlp, shift=adaln_shift)
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        out = patch * patch * self.out_channels
        self.final_layer = FinalLayer(width, out, norm=norm, class_token=class_token)
        self.register_buffer("pos_embed", sincos_2d(width, self.grid)[None], persistent=False)
        first = class_token > 0
        tables = rope_tables(width // heads, self.grid, class_token=first) if rope else None
        self.register_buffer("rope", tables, persistent=False)
        self.apply(init)
        for block in blocks:
            zero(block.adaLN_modulation[1])
        zero(self.final_layer.adaLN_modulation[1])
        zero(self.final_layer.linear)
        if self.final_layer.linear_cls is not None:
            zero(self.final_layer.linear_cls)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        side = self.grid * self.patch
        return self.channels, side, side

    def join(self, latents: Tensor, token: Tensor) -> Tensor:
        """One row (B, C H W + R) of latents (B, C, H, W) and class tokens (B, R)."""
        return torch.cat([latents.flatten(1), token], 1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the class tokens of rows from `join`."""
        latents, token = x.tensor_split([x.shape[1] - self.class_token], 1)
        return latents.unflatten(1, self.latent_shape), token

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
        class. With a class token x and the velocity are rows of both; with a representation y is
        (B, R).

        With `tap`, depths counted from 1, the result is a `Tapped` with the tokens (B, T, D) after
        those blocks. `stop_at`: blocks after that depth and the final layer do not run.
        """
        if y is None:
            rows = (len(x), self.representation) if self.representation else (len(x),)
            y = torch.full(rows, self.null_class, device=x.device)
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))  # (B, D), shared by every modulation
        token = None
        if self.class_token:
            x, token = self.split(x)
        h = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        if token is not None:
            first = self.wg_norm(self.cls_projectors2(token)).unsqueeze(1)
            h = torch.cat([first, h], 1)
        hidden: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks[:stop_at], start=1):
            h = block(h, c, self.rope)
            if depth in tap:
                hidden[depth] = h
        if stop_at is not None:
            return Tapped(None, hidden)
        patches, token = self.final_layer(h, c)
        velocity = self._unpatchify(patches)
        if token is not None:
            velocity = self.join(velocity, token)
        return Tapped(velocity, hidden) if tap else velocity

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p * p * C) -> (B, C, H, W); within a patch the order is row, column, channel."""
        b, g, p, c = len(patches), self.grid, self.patch, self.out_channels
        image = patches.reshape(b, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(b, c, g * p, g * p)


def rope_tables(head_dim: int, grid: int, *, class_token: bool) -> Tensor:
    """Cosines and sines (2, T, head_dim) of `rope_2d`; a class token, first, does not turn."""
    tables = torch.stack(rope_2d(head_dim, grid))
    if not class_token:
        return tables
    still = torch.stack([torch.ones(1, head_dim), torch.zeros(1, head_dim)])
    return torch.cat([still, tables], 1)


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
