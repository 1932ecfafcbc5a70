"""MoCo v3 against a ViT written from its definition."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from erw.encoders import load_encoder, moco
from erw.errors import CheckpointError
from helpers.vits import IMAGENET, images


def moco_checkpoint(path: Path, *, depth: int, width: int) -> dict[str, Tensor]:
    """A checkpoint as training leaves it and RCG ships it: heads, both encoders, two odd names."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, 16, 16)}
    shapes |= dict.fromkeys(("patch_embed.proj.bias", "norm.weight", "norm.bias"), (width,))
    for i in range(depth):
        for name, out, into in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = (out, into)
            shapes[f"blocks.{i}.{name}.bias"] = (out,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{part}": (width,) for part in ("weight", "bias")}
    state = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    odd = {}
    for name, value in state.items():
        if name.startswith("blocks.13."):
            name = name.replace("norm1.", "norm13.").replace("fc1.", "fc13.")
        if name.startswith("blocks.14."):
            name = name.replace("norm2.", "norm14.").replace("fc2.", "fc14.")
        odd[f"module.base_encoder.{name}"] = value
        odd[f"module.momentum_encoder.{name}"] = value + 1
    odd["module.base_encoder.pos_embed"] = positions(14, width)
    odd["module.base_encoder.head.0.weight"] = odd["module.predictor.0.weight"] = torch.ones(3, 3)
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": odd}, path)
    return state


def positions(side: int, width: int) -> Tensor:
    """(1, 1 + side^2, width): zeros for CLS, then sine and cosine of row and column."""
    table = torch.zeros(1 + side * side, width)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                omega = 1 / 10000 ** (k / quarter)
                angles = torch.tensor([row * omega, column * omega])
                place = table[1 + row * side + column]
                place[k], place[quarter + k] = angles[0].sin(), angles[0].cos()
                place[2 * quarter + k], place[3 * quarter + k] = angles[1].sin(), angles[1].cos()
    return table[None]


def moco_reference(state: dict[str, Tensor], pixels: Tensor, *, depth: int, heads: int) -> Tensor:
    """A ViT from its definition (Dosovitskiy et al. 2021), head by head."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    width = state["cls_token"].shape[-1]
    side = pixels.shape[-1] // 16
    patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kernel = state["patch_embed.proj.weight"].flatten(1)
    x = patches.flatten(1, 2) @ kernel.T + state["patch_embed.proj.bias"]
    grid = positions(14, width)[:, 1:].transpose(1, 2).view(1, width, 14, 14)
    if side != 14:
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    x = torch.cat([state["cls_token"].expand(len(x), 1, width), x + grid.flatten(2).mT], 1)
    for i in range(depth):
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, -1)
        size, outs = width // heads, []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].mT / size**0.5
            outs.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(outs, -1))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", x)[:, 1:]


@pytest.mark.parametrize("side", [224, 256])
def test_mocov3_is_the_vit_of_its_definition(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(moco.SIZES, "mocov3-b", (15, 24, 3))
    state = moco_checkpoint(tmp_path / "moco.pth.tar", depth=15, width=24)
    encoder = load_encoder(f"mocov3-b={tmp_path / 'moco.pth.tar'}")
    batch = images(1, side)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    wanted = moco_reference(state, (batch / 255 - mean) / std, depth=15, heads=3)
    torch.testing.assert_close(encoder(batch), wanted, atol=1e-3, rtol=1e-3)
    assert encoder.grid(256) == (16, 16)


def test_mocov3_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moco.SIZES, "mocov3-b", (2, 24, 3))
    path = tmp_path / "moco.pth.tar"
    moco_checkpoint(path, depth=1, width=24)
    with pytest.raises(CheckpointError, match=r"no mocov3-b: 12 missing: blocks\.1\."):
        load_encoder(f"mocov3-b={path}")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(f"mocov3-b={path}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_encoder("mocov3-l=nowhere.pth")
