"""SiT: a transformer over latent patches that predicts the velocity (arXiv 2401.08740).

Its options make the whole line: DiT (arXiv 2212.09748) is the same network with twice the output
channels and steps for times; LightningDiT (arXiv 2501.01423) has `rope`, `norm="rms"` and
`mlp="swiglu"`; REG (arXiv 2507.01467) has `class_token`; RCG (arXiv 2312.03701) conditions on a
`representation` in place of the class; DiT^DH (arXiv 2510.11690) has a wide head, `head_depth`;
SPRINT (arXiv 2510.21986) has `fusion`.

Shapes: B images, C latent channels, H = W latent pixels, p patch side, T = (H / p)^2 tokens, D
width, R channels of the class token or representation.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw.errors import ConfigError
from erw.routing import Route, index

NormKind = Literal["layer", "rms"]
MlpKind = Literal["gelu", "swiglu"]


class Tapped(NamedTuple):
    """A forward pass with taps: the velocity (None after an early stop), tokens (B, T, D), a class
    token first, by depth counted from 1, the internal output, and queries and keys by depth, each
    (B, heads, T, head_dim)."""

    velocity: Tensor | None
    hidden: dict[int, Tensor]
    internal: Tensor | None = None
    attention: Mapping[int, tuple[Tensor, Tensor]] = MappingProxyType({})


class SiT(nn.Module):
    """Scalable interpolant transformer with adaLN-Zero and frozen sin-cos positions.

    Args: as in `erw.config.Model`, and

        out_channels: of the output; None: as the latent. DiT has noise and variance (`erw.ddpm`).
        internal: block after which there is a second output layer (arXiv 2512.24176); 0: none.
        class_token: channels of a class token that is denoised too; 0: none. The state x and its
            velocity are then rows (B, C H W + R), see `join` and `split`.
        representation: channels of representations (B, R) that y is in place of labels, zeros or
            None standing for none; 0: y are labels.
    """

    def __init__(
        self, *, input_size: int = 32, channels: int = 4, patch: int = 2, depth: int = 12,
        width: int = 768, heads: int = 12, num_classes: int = 1000, rope: bool = False,
        qk_norm: bool = False, norm: NormKind = "layer", mlp: MlpKind = "gelu",
        adaln_shift: bool = True, out_channels: int | None = None, class_token: int = 0,
        representation: int = 0, internal: int = 0, head_depth: int = 0, head_width: int = 2048,
        head_heads: int = 16, fusion: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.patch, self.grid = channels, patch, grid_of(input_size, patch)
        self.latent_shape, self.tokens = (channels, input_size, input_size), self.grid**2
        self.out_channels = channels if out_channels is None else out_channels
        self.depth, self.width, self.internal = depth, width, internal
        self.null_class = 0 if representation else num_classes
        self.class_token, self.representation = class_token, representation
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimeEmbed(width)
        self.y_embedder: nn.Module = LabelEmbed(num_classes + 1, width)
        if representation:
            self.y_embedder = RepresentationEmbed(representation, width)
        if class_token:  # names as in REG's files
            self.cls_projectors2 = nn.Linear(class_token, width)
            self.wg_norm = nn.LayerNorm(width, eps=1e-6)
        sizes = [(width, heads)] * depth + [(head_width, head_heads)] * head_depth
        blocks = [
            Block(*size, qk_norm=qk_norm, norm=norm, mlp=mlp, shift=adaln_shift) for size in sizes
        ]
        self.blocks = nn.ModuleList(blocks)  # those of the head last
        if head_depth:
            self.head_embedder = PatchEmbed(channels, patch, head_width)
            self.head_projector = nn.Linear(width, head_width)
        out = patch * patch * self.out_channels
        self.final_layer = FinalLayer(sizes[-1][0], out, norm=norm, class_token=class_token)
        outputs = [self.final_layer]
        if internal:
            self.internal_layer = FinalLayer(width, out, norm=norm)
            outputs.append(self.internal_layer)
        self.register_buffer("pos_embed", sincos_2d(width, self.grid)[None], persistent=False)
        tables = rope_2d(width // heads, self.grid, class_token=class_token > 0) if rope else None
        self.register_buffer("rope", tables, persistent=False)
        tables = rope_2d(head_width // head_heads, self.grid) if rope and head_depth else None
        self.register_buffer("head_rope", tables, persistent=False)
        self.apply(init)
        for block in blocks:
            zero(block.adaLN_modulation[1])
        for last in outputs:
            for module in filter(None, (last.adaLN_modulation, last.linear, last.linear_cls)):
                zero(module)
        self.fused, self.fusion = fusion, nn.Linear(2 * width, width) if fusion else None
        self.mask_token = nn.Parameter(0.02 * torch.randn(width)) if fusion else None
        if self.fusion is not None:  # begins as the mean, so as none: blocks begin as identities
            zero(self.fusion)
            self.fusion.weight.data += torch.eye(width).repeat(1, 2) / 2

    def warmup_modules(self, depth: int) -> list[nn.Module]:
        """What a warm-up of so many blocks trains: the embedders and these blocks."""
        later = ("blocks", "fusion", "final_layer", "internal_layer", "head_")
        embedders = [m for name, m in self.named_children() if not name.startswith(later)]
        return [*embedders, *self.blocks[:depth]]

    def join(self, latents: Tensor, token: Tensor) -> Tensor:
        """One row (B, C H W + R) of latents (B, C, H, W) and class tokens (B, R)."""
        return torch.cat([latents.flatten(1), token], 1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the class tokens of rows from `join`."""
        latents, token = x.tensor_split([x.shape[1] - self.class_token], 1)
        return latents.unflatten(1, self.latent_shape), token

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, tap: tuple[int, ...] = (),
        stop_at: int | None = None, internal: bool = False, attention: tuple[int, ...] = (),
        route: Route | None = None, unrotated: bool = False,
    ) -> Tensor | Tapped:  # fmt: skip
        """The velocity at x (B, C, H, W), times t (B,) and labels y (B,), None: the null class.

        With a class token, x and the velocity are rows of both; with a representation, y is (B, R).
        `tap`, `stop_at`, `route` as in `Backbone`; `internal`: the output after that block too;
        `attention`: depths whose queries and keys are wanted; `unrotated`: without `rope`.
        """
        if y is None:
            rows = (len(x), self.representation) if self.representation else (len(x),)
            y = torch.full(rows, self.null_class, device=x.device)
        time = self.t_embedder(t)
        c = F.silu(time + self.y_embedder(y)).unsqueeze(1)  # (B, 1, D), for every modulation
        token = None
        if self.class_token:
            x, token = self.split(x)
        h = self.x_embedder(x) + self.pos_embed  # (B, T, D)
        if token is not None:
            first = self.wg_norm(self.cls_projectors2(token)).unsqueeze(1)
            h = torch.cat([first, h], 1)
        hidden: dict[int, Tensor] = {}
        attended: dict[int, tuple[Tensor, Tensor]] = {}
        first_output = None
        block: Any
        blocks, kept, dropped = route or Route()
        (first, last), f, at = self.fused or blocks, h, None
        rope = cast(Any, None if unrotated else self.rope)
        for depth, block in enumerate(self.blocks[: stop_at or self.depth], start=1):
            if depth == first:
                f = h
                if kept is not None:  # each image has angles of its own: (2, B, 1, K, head_dim)
                    at = index(h, kept, self.tokens)
                    h, rope = h.gather(1, at), None if rope is None else rope[:, at[:, None, :, 0]]
            if depth in attention:
                attended[depth] = block.queries_keys(h, c, rope)
            if dropped is not True or not first <= depth <= last:
                h = block(h, c, rope)
            if depth in tap:
                hidden[depth] = h
            if depth == last:
                h, rope = self.merged(f, h, at, dropped), self.rope
            if internal and depth == self.internal:
                first_output = self.unpatchify(self.internal_layer(h, c)[0])
        if stop_at is not None:
            return Tapped(None, hidden, first_output, attended)
        if len(self.blocks) > self.depth:  # the head reads x anew, each token modulated by its h
            c = F.silu(self.head_projector(F.silu(time.unsqueeze(1) + h)))
            h = self.head_embedder(x)
            for block in self.blocks[self.depth :]:
                h = block(h, c, self.head_rope)
        patches, token = self.final_layer(h, c)
        velocity = self.unpatchify(patches)
        if token is not None:
            velocity = self.join(velocity, token)
        if tap or internal or attention:
            return Tapped(velocity, hidden, first_output, attended)
        return velocity

    def merged(self, f: Tensor, g: Tensor, at: Tensor | None, dropped: Tensor | bool) -> Tensor:
        """All tokens behind routed blocks: f before them, g behind them those that they saw."""
        rest = f if self.mask_token is None else self.mask_token.to(f.dtype).expand_as(f)
        g = g if at is None else rest.scatter(1, at, g)
        if dropped is not False:
            g = torch.where(torch.as_tensor(dropped, device=f.device).view(-1, 1, 1), rest, g)
        return g if self.fusion is None else self.fusion(torch.cat([f, g], 2)).to(f.dtype)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, T, p p C), each by row, column and channel, as an image (B, C, H, W)."""
        g, p, side = self.grid, self.patch, self.grid * self.patch
        image = patches.reshape(-1, g, g, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.out_channels, side, side)


# Layers, in the order of the forward pass.


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbed(nn.Module):
    """Times (B,) to conditioning vectors (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # In float32 whatever the weights are: half precision cannot tell neighbouring times apart.
        return self.mlp(timestep_embedding(t, 256).to(next(self.mlp.parameters()).dtype))


class LabelEmbed(nn.Module):
    """Labels (B,) to conditioning vectors (B, D); the last row is the null class."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class RepresentationEmbed(nn.Module):
    """Representations (B, R) to conditioning vectors (B, D); a row of zeros stands for none, which
    is a learned representation (RCG, arXiv 2312.03701)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.rep_embedder = nn.Linear(dim, width)
        self.fake_latent = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, y: Tensor) -> Tensor:
        return self.rep_embedder(torch.where(y.any(1, keepdim=True), y, self.fake_latent))


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning (adaLN-Zero).

    `shift` False: not shifted (LightningDiT's `wo_shift`), with two modulations fewer.
    """

    entries = ("queries_keys",)  # methods that the network calls, beside forward

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool, norm: NormKind, mlp: MlpKind, shift: bool
    ) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = make_norm(norm, width)
        self.attn = Attention(width, heads, qk_norm=norm if qk_norm else None)
        self.norm2 = make_norm(norm, width)
        # SwiGLU has three matrices, so two thirds of the hidden width.
        self.mlp = SwiGlu(width, int(8 / 3 * width)) if mlp == "swiglu" else Mlp(width, 4 * width)
        parts = 6 if shift else 4  # shift, scale and gate, of attention and of the MLP
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))

    def forward(self, h: Tensor, c: Tensor, rope: Tensor | None) -> Tensor:
        """h (B, T, D), c = silu(conditioning) (B, 1, D), or (B, T, D), for each token its own."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(c)
        h = h + gate1 * self.attn(modulated(self.norm1(h), scale1, shift1), rope)
        return h + gate2 * self.mlp(modulated(self.norm2(h), scale2, shift2))

    def queries_keys(self, h: Tensor, c: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the block's attention for the same input, each (B, heads, T, head_dim)."""
        shift, scale, *_ = self._modulation(c)
        q, k, _ = self.attn.heads_of(modulated(self.norm1(h), scale, shift), rope)
        return q, k

    def _modulation(self, c: Tensor) -> tuple[Any, ...]:
        """Shift, scale and gate of attention and of the MLP, each (B, 1, D) or (B, T, D)."""
        modulation = self.adaLN_modulation(c)
        if self.shift:
            return modulation.chunk(6, dim=-1)
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        return None, scale1, gate1, None, scale2, gate2


def modulated(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x (B, T, D) scaled and shifted by (B, 1, D) or (B, T, D)."""
    x = x * (1 + scale)
    return x if shift is None else x + shift


class Attention(nn.Module):
    """Multi-head self-attention over all tokens; `qk_norm`: kind of norm on queries and keys."""

    def __init__(self, width: int, heads: int, *, qk_norm: NormKind | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        norm: Callable[[int], nn.Module] = nn.LayerNorm if qk_norm else nn.Identity
        norm = partial(RmsNorm, eps=1e-6) if qk_norm == "rms" else norm
        self.q_norm, self.k_norm = norm(width // heads), norm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        x = attention(*self.heads_of(x, rope))
        return self.proj(x.transpose(1, 2).flatten(2))

    def heads_of(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, T, head_dim)."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q.to(v.dtype), k.to(v.dtype), v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, all (B, heads, T, head_dim)."""
    # On a CPU plain products are up to five times as fast as the fused kernel in bf16, and no
    # slower in float32, except without a backward.
    sampling = q.dtype == torch.float32 and not torch.is_grad_enabled()
    if q.device.type != "cpu" or sampling:
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
        return self.fc2(gelu(self.fc1(x)))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).

    Compiled for a CPU it is written as the equal x sigmoid(2 u), which takes a third of the time.
    """
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        a = x.float()
        return (a * torch.sigmoid(math.sqrt(8 / math.pi) * (a + 0.044715 * a**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


class SwiGlu(nn.Module):
    """An MLP whose hidden units are gated by SiLU of as many others (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class FinalLayer(nn.Module):
    """Tokens to patches of the output, (B, T, D) -> (B, T, p * p * C), and to the class token
    (B, `class_token`), None without one; it stands before the patches."""

    def __init__(self, width: int, out: int, *, norm: NormKind, class_token: int = 0) -> None:
        super().__init__()
        self.norm_final = make_norm(norm, width)
        self.linear = nn.Linear(width, out)
        self.linear_cls = nn.Linear(width, class_token) if class_token else None
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        h = modulated(self.norm_final(h), scale, shift)
        if self.linear_cls is None:
            return self.linear(h), None
        return self.linear(h[:, 1:]), self.linear_cls(h[:, 0])


def init(module: nn.Module) -> None:
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


def zero(module: nn.Module) -> None:
    """Zeros in all of a module's parameters."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def make_norm(kind: NormKind, width: int) -> nn.Module:
    """The norm before a modulation: LayerNorm without gain, or RMSNorm with one (LightningDiT)."""
    if kind == "rms":
        return RmsNorm(width, eps=1e-6)
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class RmsNorm(nn.RMSNorm):
    """Root-mean-square norm in float32, given back in the dtype that came in."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


def _angles(grid: int, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, row-major, times `count` frequencies: (grid * grid, count)."""
    omega = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    axes = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    rows, columns = (axis.reshape(-1, 1).double() * omega for axis in axes)
    return rows, columns


def sincos_2d(width: int, grid: int) -> Tensor:
    """Frozen 2-D sin-cos positions (grid * grid, width), row-major.

    The first half of the channels holds the column, the second the row, each as sines then cosines
    of width / 4 frequencies (MAE, arXiv 2111.06377; DiT and SiT use the same).
    """
    rows, columns = _angles(grid, width // 4)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1).float()


def rope_2d(head_dim: int, grid: int, *, class_token: bool = False) -> Tensor:
    """Cosines and sines (2, T, head_dim) of axial rotary positions.

    EVA-02's form (arXiv 2303.11331), also LightningDiT's: the first half of a head turns with the
    row, the second with the column; channels 2i and 2i + 1 form a pair that turns by one angle. A
    leading class token is not rotated.
    """
    angle = torch.cat(_angles(grid, head_dim // 4), dim=1).repeat_interleave(2, dim=1)
    if class_token:
        angle = torch.cat([torch.zeros(1, head_dim, dtype=torch.float64), angle])
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved channel pairs of x (B, heads, T, head_dim) by `rope_2d`'s angles."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of times (B,): cosines, then sines, periods up to 10,000."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) / half * steps)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_of(input_size: int, patch: int) -> int:
    """Patches along a side of a latent. Raises ConfigError where they do not tile it."""
    if input_size % patch:
        raise ConfigError(f"patches of {patch} do not tile a latent of {input_size} x {input_size}")
    return input_size // patch
