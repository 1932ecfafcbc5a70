"""LightningDiT's options: modulations without shift, released files with their statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erw.cli import main
from erw.errors import CheckpointError
from erw.interop import load_pretrained
from erw.interop.convert import convert
from erw.models import SiT
from erw.sampling import generate
from helpers.compvis import Reference, small
from helpers.reference import relative
from helpers.released import LIGHTNING, SIZE, peer, same, save

__all__ = ["small"]  # a fixture
UNSHIFTED = LIGHTNING | {"adaln_shift": False}


def test_without_shift_it_is_the_network_whose_shifts_are_zero() -> None:
    """The four modulations are those of the shifted network: scale, gate, scale, gate."""
    net, whole = (
        SiT(**SIZE | LIGHTNING, adaln_shift=on).requires_grad_(False) for on in (False, True)
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = dict(net.state_dict())
    for name, value in whole.state_dict().items():
        if name.startswith("blocks.") and ".adaLN_modulation." in name:
            scale1, gate1, scale2, gate2 = state[name].chunk(4)
            zero = torch.zeros_like(scale1)
            state[name] = torch.cat([zero, scale1, gate1, zero, scale2, gate2])
            assert state[name].shape == value.shape
    whole.load_state_dict(state)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 1000])
    assert relative(net(x, t, y), whole(x, t, y)) < 1e-6


def test_files_without_shift_there_and_back(tmp_path: Path) -> None:
    state = peer(**UNSHIFTED)
    path = save(state, tmp_path / "a.pt")
    model = load_pretrained(path)
    assert model.origin.startswith("lightningdit") and not model.run.model.adaln_shift
    convert(path, tmp_path / "b.pt", to="lightningdit")
    same(torch.load(tmp_path / "b.pt"), state)
    plain = peer(adaln_shift=False)
    path = save(plain, tmp_path / "c.pt")
    model = load_pretrained(path, num_heads=4)
    assert model.origin.startswith("lightningdit (modulations without shift)")
    with pytest.raises(CheckpointError, match="choose"):
        convert(path, tmp_path / "d.pt", to="repa", num_heads=4)


def test_a_released_file_samples_with_its_latents_statistics(
    small: Reference, tmp_path: Path
) -> None:
    """From the command line: the file, VA-VAE beside latents_stats.pt, the released sampler."""
    z = torch.randn(1, 4, 8, 8)
    small.encode(torch.zeros(1, 3, 16, 16)), small.decode(z)
    torch.save({"state_dict": small.state}, tmp_path / "vavae.pt")
    stats = {"mean": torch.arange(4.0).view(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 0.5)}
    torch.save(stats, tmp_path / "latents_stats.pt")
    file = save(
        {"ema": {f"module.{k}": v for k, v in peer(**LIGHTNING).items()}}, tmp_path / "l.pt"
    )
    vae, out = f"va-vae={tmp_path / 'vavae.pt'}", tmp_path / "out"
    asked = ["sample", str(file), "--out", str(out), "--vae", vae, "--seeds", "0:2"]
    assert main([*asked, "--steps", "3", "--guidance", "2", "--labels", "7,9"]) == 0
    model = load_pretrained(file)
    sampler = model.run.sample
    assert (sampler.steps, sampler.solver, tuple(sampler.interval)) == (249, "euler", (0.0, 0.89))
    assert sampler.shift == pytest.approx(1 / 0.3)
    how = {"steps": 3, "solver": "euler", "shift": 1 / 0.3, "guidance": 2.0}
    latents = (
        generate(
            model, [0, 1], [7, 9], interval=(0.0, 0.89), guided_channels=3, decode=False, **how
        )
        .collect()
        .latents
    )
    raw = latents * stats["std"] + stats["mean"]
    expected = ((small.decode(raw) + 1) * 127.5).round().clamp(0, 255)
    for i in range(2):
        with Image.open(out / f"{i:08d}.png") as image:
            made = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (made.float() - expected[i]).abs().max() <= 1
