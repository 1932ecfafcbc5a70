"""Every family in its real on-disk format: the same patch tokens as the library's own model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw.data.networks import weight_hash
from erw.encoders import Encoder, ModuleEncoder, load_encoder, load_vae, moco, vits
from erw.encoders.pretrained import Hub
from erw.errors import CheckpointError, ConfigError, DataError
from helpers.vits import FAMILIES, HALF, IMAGENET, TINY, images, saved

transformers = pytest.importorskip("transformers")


def library_tokens(entry: str, model: Any, pixels: Tensor, *, before: int | None = None) -> Tensor:
    """Tokens as the library's own model gives them for normalised pixels, those of patches or all
    from `before` on."""
    before = FAMILIES[entry][4] if before is None else before
    more: dict[str, Any] = {} if entry.startswith("dinov") else {"interpolate_pos_encoding": True}
    if entry in ("clip-l", "siglip2-b"):
        model = model.vision_model
    if entry == "mae-l":
        model = model.vit
        model.config.mask_ratio = 0.0
        patches = (pixels.shape[-1] // 16) ** 2
        more["noise"] = torch.arange(patches).float()[None].expand(len(pixels), -1)
    with torch.no_grad():
        return model(pixel_values=pixels, **more).last_hidden_state[:, before:]


@pytest.mark.parametrize("entry", FAMILIES)
def test_tokens_are_those_of_the_librarys_model(entry: str, tmp_path: Path) -> None:
    model = saved(entry, tmp_path / "weights")
    encoder = load_encoder(f"{entry}={tmp_path / 'weights'}")
    assert encoder.name == entry and encoder.grid(256) == (16, 16) and encoder.dim == 24
    batch = images()
    _, _, (mean, std), side, first = FAMILIES[entry]
    pixels = batch.float()
    if side != 256:
        pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    pixels = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    tokens = encoder(batch)
    assert tokens.shape == (2, 256, 24) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens, library_tokens(entry, model, pixels), atol=1e-4, rtol=1e-4)
    patches, token = encoder.both(batch)
    assert torch.equal(patches, tokens) and token.shape == (2, encoder.dim_class)
    if entry.startswith("dino") or entry == "mae-l":  # CLS after the last norm, of the same pass
        whole = library_tokens(entry, model, pixels, before=0)
        torch.testing.assert_close(token, whole[:, 0], atol=1e-4, rtol=1e-4)
    width, tokens = TINY["hidden_size"], 256 + first
    hidden = 4 * width if entry.startswith("dinov2") else TINY["intermediate_size"]
    block = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * hidden
    embedding = 2 * 3 * width * side**2  # every pixel takes part once
    assert 0.99 < encoder.flops(256) / (2 * block + embedding) < 1.1  # more: a head for pooling
    assert not encoder.train().training
    smaller = load_encoder(f"{entry}={tmp_path / 'weights'}@{side // 2}")
    assert smaller.name == f"{entry}@{side // 2}" and smaller.grid(64) == (8, 8)
    assert smaller(images(1, 64)).shape == (1, 64, 24)


def test_every_entry_of_the_hub_is_of_a_family_and_registered() -> None:
    from erw.encoders.registry import ENCODERS

    assert set(vits.HUB) | set(moco.SIZES) < set(ENCODERS)
    for family, hub in vits.HUB.values():
        assert hasattr(transformers, vits.FAMILIES[family].model)
        assert hub.revision and len(hub.revision) == 40


def test_a_bare_folder_tells_its_family(tmp_path: Path) -> None:
    saved("dinov2-b", tmp_path / "my-dino")
    encoder = load_encoder(str(tmp_path / "my-dino"))
    assert encoder.name == "my-dino" and encoder.grid(256) == (16, 16)
    same = load_encoder(f"dinov2-b={tmp_path / 'my-dino'}")
    assert torch.equal(encoder(images(1)), same(images(1)))


def test_a_bare_folder_tells_its_mean_and_deviation(tmp_path: Path) -> None:
    folder = tmp_path / "my-dino"
    model, told = saved("dinov2-b", folder), folder / "preprocessor_config.json"
    plain = load_encoder(str(folder))
    batch = images(1, 224)
    told.write_text(json.dumps({"image_mean": HALF[0], "image_std": HALF[1]}))
    own = load_encoder(f"{folder}@224")
    wanted = library_tokens("dinov2-b", model, batch / 127.5 - 1)
    torch.testing.assert_close(own(batch), wanted, atol=1e-4, rtol=1e-4)
    by_name = load_encoder(f"dinov2-b={folder}")  # an entry has its own
    assert torch.equal(by_name(batch), plain(batch))
    assert weight_hash(by_name) == weight_hash(plain) != weight_hash(own)
    told.write_text(json.dumps({"image_mean": IMAGENET[0]}))
    assert weight_hash(load_encoder(str(folder))) == weight_hash(plain)
    for key, wrong in (
        ("image_std", [0.5, 0.5, 0]), ("image_mean", [0.5, 0.5]), ("image_std", 0.5),
        ("image_mean", [0.5, 0.5, float("nan")]), ("image_mean", ["a", 1, 1]),
    ):  # fmt: skip
        told.write_text(json.dumps({key: wrong}))
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json has {key} .*three"):
            load_encoder(str(folder))
    for text, line in (("[]", "holds a list"), ("{", "cannot be read as JSON")):
        told.write_text(text)
        with pytest.raises(CheckpointError, match=line):
            load_encoder(str(folder))


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("dinov2-b", tmp_path / "dino")
    with pytest.raises(CheckpointError, match="of type 'dinov2'; mae-l expects vit_mae"):
        load_encoder(f"mae-l={tmp_path / 'dino'}")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_encoder(f"mae-l={tmp_path}")
    with pytest.raises(ConfigError, match="multiple of its patch, 14"):
        load_encoder(f"dinov2-b={tmp_path / 'dino'}@100")
    with pytest.raises(DataError, match=r"does not divide images of 72 px.*@224"):
        load_encoder(f"dinov2-b={tmp_path / 'dino'}").grid(72)
    weights = tmp_path / "dino" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_encoder(f"dinov2-b={tmp_path / 'dino'}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(vits.HUB, "dinov2-b", ("dinov2", Hub("nobody/nothing", "0" * 40)))
    with pytest.raises(CheckpointError, match=r"nobody/nothing.*cannot be fetched.*=FOLDER"):
        load_encoder("dinov2-b")
    with pytest.raises(CheckpointError, match=r"mocov3-b=FILE"):
        load_encoder("mocov3-b")


# -- MoCo v3, against a ViT written from its definition --


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
    monkeypatch.setitem(moco.SIZES, "mocov3-b", moco.Size(15, 24, 3))
    state = moco_checkpoint(tmp_path / "moco.pth.tar", depth=15, width=24)
    encoder = load_encoder(f"mocov3-b={tmp_path / 'moco.pth.tar'}")
    batch = images(1, side)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    wanted = moco_reference(state, (batch / 255 - mean) / std, depth=15, heads=3)
    torch.testing.assert_close(encoder(batch), wanted, atol=1e-3, rtol=1e-3)
    assert encoder.grid(256) == (16, 16)


def test_mocov3_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moco.SIZES, "mocov3-b", moco.Size(2, 24, 3))
    path = tmp_path / "moco.pth.tar"
    moco_checkpoint(path, depth=1, width=24)
    with pytest.raises(CheckpointError, match=r"no mocov3-b: 12 missing: blocks\.1\."):
        load_encoder(f"mocov3-b={path}")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_encoder(f"mocov3-b={path}")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_encoder("mocov3-l=nowhere.pth")


# -- the inside of a VAE, and a module of one's own --


def test_features_of_a_vae() -> None:
    encoder = load_encoder("vae:openmoji-f4c4")
    vae = load_vae("openmoji-f4c4")
    batch, seen = images(2, 64), []
    hook = vae.network.encoder.mid_block.register_forward_hook(lambda *a: seen.append(a[2]))
    vae.encode(batch)
    hook.remove()
    wanted = seen[0].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).flatten(2).mT
    assert encoder.grid(64) == (8, 8) and encoder.dim == wanted.shape[-1]
    torch.testing.assert_close(encoder(batch), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="no features"):
        load_encoder("vae:none")


MODULE = """
from torch import nn
from erw.encoders import ModuleEncoder

def build():
    return ModuleEncoder("mine", nn.Conv2d(3, 5, 8, 8), dim=5, patch=8, mean=(0.5,) * 3)

def wrong():
    return nn.Conv2d(3, 5, 8, 8)

def broken():
    raise KeyError("no such\\nthing")
"""


def test_a_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_teacher.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = load_encoder("my_teacher:build")
    assert isinstance(encoder, Encoder) and encoder.name == "mine"
    batch = images(2, 64)
    assert encoder.grid(64) == (4, 4) and encoder(batch).shape == (2, 16, 5)
    small = F.interpolate(batch.float(), (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    wanted = encoder.module(small / 255 - 0.5).flatten(2).mT  # type: ignore[operator]
    torch.testing.assert_close(encoder(batch), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="gave a Conv2d"):
        load_encoder("my_teacher:wrong")
    with pytest.raises(ConfigError, match="MODULE:FUNCTION"):
        load_encoder("my_teacher:none")
    with pytest.raises(ConfigError, match=r"my_teacher:broken.*KeyError: 'no such.*thing'"):
        load_encoder("my_teacher:broken")
    with pytest.raises(DataError, match=r"expected \(16, 7\)"):
        ModuleEncoder("off", nn.Conv2d(3, 5, 8, 8), dim=7, patch=8)(batch)
