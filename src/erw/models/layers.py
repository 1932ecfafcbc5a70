"""The layers of a diffusion transformer. Parameter names follow the released DiT, SiT, REPA and
LightningDiT, so that their files load with few renames.

Shapes: B images, T tokens, D width.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw.models.positions import rotate, timestep_embedding

NormKind = Literal["layer", "rms"]
MlpKind = Literal["gelu", "swiglu"]


def make_norm(kind: NormKind, width: int) -> nn.Module:
    """The norm in front of a modulation: LayerNorm without gain, or RMSNorm with one
    (LightningDiT)."""
    if kind == "rms":
        return RmsNorm(width, eps=1e-6)
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def make_qk_norm(kind: NormKind, head_dim: int) -> nn.Module:
    """The norm of queries or keys, with gain; LayerNorm's also has a bias."""
    return RmsNorm(head_dim, eps=1e-6) if kind == "rms" else nn.LayerNorm(head_dim)


def make_mlp(kind: MlpKind, width: int) -> nn.Module:
    """The MLP of a block: four times the width with GELU, or as many weights with SwiGLU."""
    return SwiGlu(width, swiglu_hidden(width)) if kind == "swiglu" else Mlp(width, 4 * width)


def swiglu_hidden(width: int) -> int:
    """Hidden units of SwiGLU: two thirds of 4 width, because it has three matrices, not two."""
    return int(2 / 3 * (4 * width))


class RmsNorm(nn.RMSNorm):
    """Root-mean-square norm in float32, given back in the dtype that came in."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


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
        # In float32 whatever the weights are: half precision cannot tell neighbouring times apart.
        frequencies = timestep_embedding(t, self.frequencies)
        return self.mlp(frequencies.to(next(self.mlp.parameters()).dtype))


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
        self.dim = dim
        self.rep_embedder = nn.Linear(dim, width)
        self.fake_latent = nn.Parameter(0.02 * torch.randn(dim))

    def forward(self, y: Tensor) -> Tensor:
        return self.rep_embedder(torch.where(y.any(1, keepdim=True), y, self.fake_latent))


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning (adaLN-Zero).

    `shift` False: not shifted (LightningDiT's `wo_shift`), with two modulations fewer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        norm: NormKind,
        mlp: MlpKind,
        shift: bool = True,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = make_norm(norm, width)
        self.attn = Attention(width, heads, qk_norm=norm if qk_norm else None)
        self.norm2 = make_norm(norm, width)
        self.mlp = make_mlp(mlp, width)
        parts = modulations(shift)
        self.adaLN_modulation = nn.Sequential(nn.Identity(), nn.Linear(width, parts * width))

    def forward(self, h: Tensor, c: Tensor, rope: Tensor | None) -> Tensor:
        """h (B, T, D), c = silu(conditioning) (B, D)."""
        modulation = self.adaLN_modulation(c).unsqueeze(1)
        shift1 = shift2 = None
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        else:
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        h = h + gate1 * self.attn(modulated(self.norm1(h), scale1, shift1), rope)
        return h + gate2 * self.mlp(modulated(self.norm2(h), scale2, shift2))


def modulations(shift: bool) -> int:
    """Vectors of a block's modulation: scale and gate, and perhaps shift, of attention and MLP."""
    return 6 if shift else 4


def modulated(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x (B, T, D) scaled and shifted by (B, 1, D)."""
    x = x * (1 + scale)
    return x if shift is None else x + shift


class Attention(nn.Module):
    """Multi-head self-attention over all tokens; `qk_norm`: kind of norm on queries and keys."""

    def __init__(self, width: int, heads: int, *, qk_norm: NormKind | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = make_qk_norm(qk_norm, width // heads) if qk_norm else nn.Identity()
        self.k_norm = make_qk_norm(qk_norm, width // heads) if qk_norm else nn.Identity()
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
    slower in float32. Without a backward, as in sampling, the fused kernel is the faster one in
    float32 (21 ms against 41 for 8 x 12 heads of 256 tokens) and not in bf16 (22 against 17).
    """
    alone = q.dtype == torch.float32 and not torch.is_grad_enabled()
    if q.device.type != "cpu" or alone:
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

    Compiled for a CPU it is the same thing as x sigmoid(2 u): forward and backward take 6 ms where
    the tanh takes 16 (bf16, 2048 x 3072, one core).
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
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
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
