"""Encoders from a module, from a function of the user's own, and from the inside of a VAE."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from erw.encoders import Encoder, ModuleEncoder, load_encoder, load_vae
from erw.errors import ConfigError, DataError
from erw.io import weight_hash
from helpers.vits import images


def test_pixels_are_the_colours_of_each_patch() -> None:
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    encoder = load_encoder("pixels@16")
    tokens = encoder(images)
    assert encoder.name == "pixels@16" and tokens.shape == (2, 16, 48)
    patch = images[1, :, 4:8, 8:12] / 127.5 - 1  # row 1, column 2
    torch.testing.assert_close(tokens[1, 6].sort().values, patch.flatten().sort().values)
    with pytest.raises(ConfigError, match="has no weights"):
        load_encoder("pixels=file")


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


def test_a_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A console script has the folder of the script on its path, and not the current one."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p) != tmp_path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher_here.py").write_text(
        "from erw.encoders import load_encoder\n"
        "def make(): return load_encoder('efficientnet-lite0')\n"
    )
    assert load_encoder("teacher_here:make").name == "efficientnet-lite0"
    for name, line in (("damaged_here", "1 / 0"), ("leaving_here", "raise SystemExit('bye')")):
        (tmp_path / f"{name}.py").write_text(line)
    with pytest.raises(ConfigError, match=r"damaged_here:f.*ZeroDivisionError: division by zero"):
        load_encoder("damaged_here:f")
    with pytest.raises(ConfigError, match=r"leaving_here:f.*SystemExit: bye"):
        load_encoder("leaving_here:f")


def test_normalisation_and_patch_of_a_module_are_part_of_its_hash() -> None:
    module = torch.nn.AdaptiveAvgPool2d(
        4
    )  # no weights: all that tells one from another is beside it
    plain = ModuleEncoder("pool", module, dim=3)
    assert not plain.state_dict()  # hashes of caches with the defaults stay what they were
    assert plain.flops(64) == 0
    others = {"mean": (0.5,) * 3}, {"std": (0.5,) * 3}, {"patch": 8}
    hashes = [weight_hash(ModuleEncoder("pool", module, dim=3, **how)) for how in others]
    assert len({weight_hash(plain), *hashes}) == 4
