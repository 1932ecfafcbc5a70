"""Encoders by name, from outside the package too, and on a GPU."""

from pathlib import Path

import pytest
import torch

from erw.encoders import Encoder, ModuleEncoder, load_encoder
from erw.encoders.registry import ENCODERS
from erw.errors import ConfigError
from helpers.images import glyphs


def test_encoder_by_name() -> None:
    assert load_encoder("efficientnet-lite0@192").grid(64) == (12, 12)
    with pytest.raises(ConfigError, match="did you mean efficientnet-lite0"):
        load_encoder("efficientnet_lite0")
    with pytest.raises(ConfigError, match="known: "):
        load_encoder("zzz")
    with pytest.raises(ConfigError, match="side in pixels"):
        load_encoder("efficientnet-lite0@big")
    with pytest.raises(ConfigError, match="multiple of its patch, 16"):
        load_encoder("efficientnet-lite0@100")
    with pytest.raises(ConfigError, match="comes with its weights"):
        load_encoder("efficientnet-lite0=weights.pth")


def test_an_entry_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *, side: int | None = None, weights: Path | None = None) -> Encoder:
        assert weights == Path("file.pt")
        module = torch.nn.AvgPool2d(8)
        return ModuleEncoder(f"{name}@{side}", module, dim=3, patch=8, side=side)

    monkeypatch.setitem(ENCODERS, "mine", load)
    encoder = load_encoder("mine=file.pt@32")
    assert encoder.name == "mine@32" and encoder(glyphs("test", 2)).shape == (2, 16, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["efficientnet-lite0", "vae:openmoji-f4c4"])
def test_a_gpu_gives_the_features_of_the_cpu(name: str) -> None:
    images = glyphs("test", 4)
    on_gpu, on_cpu = load_encoder(name, device="cuda"), load_encoder(name)
    torch.testing.assert_close(on_gpu(images).cpu(), on_cpu(images), atol=0.02, rtol=0.02)
    if on_cpu.dim_pooled:
        torch.testing.assert_close(
            on_gpu.pooled(images).cpu(), on_cpu.pooled(images), atol=0.02, rtol=0.02
        )
