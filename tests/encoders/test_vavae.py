"""VA-VAE from LightningDiT's file, against CompVis' autoencoder written from its definition."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from erw.encoders import load_vae
from erw.errors import CheckpointError
from helpers.compvis import Reference, small

__all__ = ["small"]  # a fixture


def images(side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)


def test_va_vae_from_lightningdits_file(small: Reference, tmp_path: Path) -> None:
    wanted = small.encode(images().float() / 127.5 - 1)
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    shown = small.decode(z)
    extra = {"loss.logvar": torch.zeros(()), "foundation_model.model.norm.weight": torch.ones(3)}
    path = tmp_path / "vavae.pt"
    torch.save({"state_dict": small.state | extra, "epoch": 3}, path)
    assert load_vae(f"va-vae={path}").scale is None  # measured on the images that are prepared
    mean, deviation = torch.arange(4.0), torch.arange(1.0, 5.0)
    stats = {"mean": mean.view(1, 4, 1, 1), "std": deviation.view(1, 4, 1, 1)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    vae = load_vae(f"va-vae={path}")
    assert (vae.channels, vae.factor) == (4, 2)
    assert torch.equal(vae.shift.flatten(), mean) and torch.equal(
        vae.scale.flatten(), 1 / deviation
    )
    found, spread = vae.encode(images()).chunk(2, 1)
    torch.testing.assert_close(found, wanted[:, :4], atol=1e-4, rtol=1e-3)
    expected = (wanted[:, 4:].clamp(-30, 20) / 2).exp()
    torch.testing.assert_close(spread, expected, atol=1e-4, rtol=1e-3)
    made = vae.decode((z - vae.shift) * vae.scale)
    assert (made.float() - ((shown + 1) * 127.5).round().clamp(0, 255)).abs().max() <= 1


def test_va_vae_files_that_do_not_fit(small: Reference, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="va-vae=FILE"):
        load_vae("va-vae")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_vae("va-vae=nowhere.pt")
    small.encode(torch.zeros(1, 3, 8, 8))
    torch.save({"state_dict": small.state}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match=r"no VA-VAE f16d32: \d+ missing: decoder"):
        load_vae(f"va-vae={tmp_path / 'half.pt'}")
