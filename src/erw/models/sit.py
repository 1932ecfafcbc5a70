"""SiT: a transformer over latent patches that predicts the velocity (arXiv 2401.08740).

Shapes: B images, C latent channels, H = W latent pixels, p patch side, T = (H / p)^2 tokens, D
width. Parameter names follow the released SiT and REPA, so that their files load with few renames.
"""

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw.errors import ConfigError
from erw.models.positions import rope_2d, rotate, sincos_2d, timestep_embedding

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
        rope: rotary positions in attention. qk_norm: LayerNorm on queries and keys.

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
    ) -> None:
        super().__init__()
        self.channels, self.patch, self.grid = channels, patch, grid_of(input_size, patch)
        self.width, self.null_class = width, num_classes
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimeEmbed(width)
        self.y_embedder = LabelEmbed(num_classes + 1, width)
        blocks = [Block(width, heads, qk_norm=qk_norm) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.register_buffer("pos_embed", sincos_2d(width, self.grid)[None], persistent=False)
        tables = torch.stack(rope_2d(width // heads, self.grid)) if rope else None
        self.register_buffer("rope", tables, persistent=False)
        self.apply(_init)
        for block in blocks:
            _zero(block.adaLN_modulation[1])
        _zero(self.final_layer.adaLN_modulation[1])
        _zero(self.final_layer.linear)

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
        b, g, p, c = len(patches), self.grid, self.patch, self.channels
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


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    """Times (B,) to conditioning vectors (B, D)."""

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequencies))


class LabelEmbed(nn.Module):
    """Labels (B,) to conditioning vectors (B, D); the last row is the null class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor, rope: Tensor | None) -> Tensor:
        """h (B, T, D), c = silu(conditioning) (B, D)."""
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = h + gate1 * self.attn(self.norm1(h) * (1 + scale1) + shift1, rope)
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        x = attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, all (B, heads, T, head_dim).

    On a CPU plain products: forward and backward took 3.0 ms where the fused kernel took 16.4
    (bf16, 64 x 2 heads of 64 tokens), 23 ms against 65 for SiT-B/2's 256 tokens, and were no
    slower in float32.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):  # which would make the softmax float32 and copy it
        weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)
        return weights @ v


class Mlp(nn.Module):
    """Two layers with a tanh-approximated GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """Tokens to patches of the velocity: (B, T, D) -> (B, T, p * p * C)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(h) * (1 + scale) + shift)


def _init(module: nn.Module) -> None:
    """SiT's initialisation; the zeros of adaLN-Zero come after it."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, TimeEmbed):  # visited after its layers
        for layer in module.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
