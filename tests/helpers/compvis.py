"""CompVis' autoencoder, which VA-VAE's file is of, from its definition, in small."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from erw.encoders import vae


class Reference:
    """CompVis' autoencoder from its definition; weights are drawn when they are first asked for."""

    groups, widths, layers, latent = 4, (8, 16), 1, 4

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(3)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            self.state[name] = 0.2 * torch.randn(shape, generator=self.random)
        return self.state[name]

    def conv(self, name: str, x: Tensor, out: int, size: int = 3, **how: int) -> Tensor:
        kernel = self.weight(f"{name}.weight", out, x.shape[1], size, size)
        how = {"padding": size // 2} | how
        return F.conv2d(x, kernel, self.weight(f"{name}.bias", out), **how)

    def norm(self, name: str, x: Tensor) -> Tensor:
        width = x.shape[1]
        scale = self.weight(f"{name}.weight", width), self.weight(f"{name}.bias", width)
        return F.group_norm(x, self.groups, *scale, eps=1e-6)

    def block(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        width = x.shape[1]
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2) for part in "qkv")
        weights = (q.mT @ k / width**0.5).softmax(-1)  # (B, to, from)
        h = (v @ weights.mT).unflatten(2, x.shape[2:])
        return x + self.conv(f"{name}.proj_out", h, width, 1)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.block(f"{name}.mid.block_1", x, self.widths[-1])
        x = self.attention(f"{name}.mid.attn_1", x)
        return self.block(f"{name}.mid.block_2", x, self.widths[-1])

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x, self.widths[0])
        for level, width in enumerate(self.widths):
            last = level == len(self.widths) - 1
            for j in range(self.layers):
                x = self.block(f"encoder.down.{level}.block.{j}", x, width)
                x = self.attention(f"encoder.down.{level}.attn.{j}", x) if last else x
            if not last:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(
                    f"encoder.down.{level}.downsample.conv", x, width, stride=2, padding=0
                )
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, 2 * self.latent),
                         2 * self.latent, 1)  # fmt: skip

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, self.latent, 1), 16)
        x = self.middle("decoder", x)
        for level in reversed(range(len(self.widths))):
            for j in range(self.layers + 1):
                x = self.block(f"decoder.up.{level}.block.{j}", x, self.widths[level])
                if level == len(self.widths) - 1:
                    x = self.attention(f"decoder.up.{level}.attn.{j}", x)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, self.widths[level])
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), 3)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Reference:
    reference = Reference()
    for key, value in {
        "latent_channels": 4, "block_out_channels": reference.widths, "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    }.items():  # fmt: skip
        monkeypatch.setitem(vae.VA_VAE["config"], key, value)
    return reference
