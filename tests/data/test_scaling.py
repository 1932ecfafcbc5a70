"""Latents scaled per channel: by what a VAE's files tell, or by what is measured on the data."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from erw import export, from_pretrained, generate, load
from erw.cli import main
from erw.data import Cache, Loader
from erw.encoders import load_encoder, load_vae
from erw.errors import CheckpointError, ConfigError
from erw.training import train
from helpers.parts import make, photos, picture
from helpers.tiny import tiny_run

CHANNELS = 4
MEAN, DEVIATION = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 4.0, 1.0]
TEACHER = "efficientnet-lite0"


def folder(path: Path, channels: int = CHANNELS, **told: object) -> Path:
    """E2E-VAE's form on the hub: an AutoencoderKL with attention at its last level, statistics in
    config.json beside diffusers' default of scaling_factor."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        latent_channels=channels,
        **told,
    )
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Weights without statistics, photos, and a cache that has measured them."""
    root = tmp_path_factory.mktemp("scaling")
    name = f"e2e-sdvae={folder(root / 'vae')}"
    photos(root / "set")
    how = {"image_size": 16, "encoders": [load_encoder(TEACHER)]}
    cache = make(root / "set", root / "cache", name, **how)
    return SimpleNamespace(root=root, name=name, cache=cache, how=how)


@pytest.mark.parametrize(("entry", "channels"), [("sdvae", 4), ("invae", 32), ("vavae", 32)])
def test_e2e_vaes_by_the_statistics_of_their_config(
    entry: str, channels: int, tmp_path: Path
) -> None:
    mean, deviation = MEAN * (channels // 4), DEVIATION * (channels // 4)
    weights = folder(tmp_path / "vae", channels, latents_mean=mean, latents_std=deviation)
    config = json.loads((weights / "config.json").read_text())
    assert config["scaling_factor"] == 0.18215  # diffusers writes it; it has no part in this
    vae = load_vae(f"e2e-{entry}={weights}")
    assert (vae.channels, vae.factor) == (channels, 2)
    assert vae.shift.flatten().tolist() == mean
    assert vae.scale.flatten().tolist() == [1 / value for value in deviation]
    raw = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = torch.stack([(raw[:, c] - mean[c]) / deviation[c] for c in range(channels)], 1)
    with torch.no_grad():
        shown = (vae.network.decode(raw).sample + 1) * 127.5
    assert (vae.decode(latents).float() - shown.round().clamp(0, 255)).abs().max() <= 1
    short = folder(tmp_path / "short", channels, latents_mean=mean, latents_std=deviation[:3])
    with pytest.raises(CheckpointError, match=f"expected {channels} means"):
        load_vae(f"e2e-{entry}={short}")


def test_what_is_measured_scales_what_is_read(made: SimpleNamespace) -> None:
    manifest = made.cache.manifest
    assert manifest.spec.vae.scale is None
    assert manifest.scaling["shift"] == list(manifest.latent_mean)
    assert manifest.scaling["scale"] == [1 / value for value in manifest.latent_std]
    batch = made.cache.read(range(24))
    noise = torch.randn(400, *batch.std.shape[1:], generator=torch.Generator().manual_seed(0))
    samples = batch.mean[:, None] + batch.std[:, None] * noise
    torch.testing.assert_close(samples.mean((0, 1, 3, 4)), torch.zeros(CHANNELS), atol=0.02, rtol=0)
    torch.testing.assert_close(samples.std((0, 1, 3, 4)), torch.ones(CHANNELS), atol=0.02, rtol=0)
    plain = load_vae(made.name).scaled([0.0] * CHANNELS, [1.0] * CHANNELS)
    again = load_vae(made.name).scaled(**made.cache.scaling)
    raw = batch.mean / again.scale + again.shift
    assert torch.equal(plain.decode(raw), again.decode(batch.mean))


def test_a_further_cache_is_scaled_as_the_first(made: SimpleNamespace, tmp_path: Path) -> None:
    dark = photos(tmp_path / "dark", each=1)
    for number, path in enumerate(dark.rglob("*.png")):
        Image.fromarray(picture(number) // 4).save(path)
    other = make(dark, tmp_path / "other", made.name, **made.how)
    both = Cache.open([made.cache.path, other.path])
    assert both.scaling == made.cache.scaling != other.scaling
    assert torch.equal(both.read([7]).mean, made.cache.read([7]).mean)
    shift, scale = (
        torch.tensor([cache.scaling[name] for cache in (other, made.cache)])[..., None, None]
        for name in ("shift", "scale")
    )
    raw = other.read([1]).mean[0] / scale[0] + shift[0]
    torch.testing.assert_close(both.read([25]).mean[0], (raw - shift[1]) * scale[1])


def test_scalar_scales_stay_as_they_were(made: SimpleNamespace, tmp_path: Path) -> None:
    name = f"sd-vae-ft-ema={made.name.partition('=')[2]}"
    cache = make(made.root / "set", tmp_path / "scalar", name, image_size=16)
    assert cache.scaling is None and cache.vae["scale"] == pytest.approx([0.18215] * CHANNELS)


def test_a_run_decodes_with_what_its_cache_measured(made: SimpleNamespace, tmp_path: Path) -> None:
    run = tiny_run(made.cache.path)
    model = dataclasses.replace(run.model, patch=4)
    run = run.replace(model=model, plan=dataclasses.replace(run.plan, warmup=1), steps=2)
    train(run, tmp_path / "run")
    model = load(tmp_path / "run")
    assert model.scaling == made.cache.scaling and model.vae == made.name
    drawn = generate(model, range(3), steps=2)
    samples = drawn.collect()
    wanted = load_vae(made.name).scaled(**made.cache.scaling)
    assert torch.equal(samples.images, wanted.decode(samples.latents))
    assert drawn.settings["scaling"] == made.cache.scaling
    # Whatever files lie beside the weights later: the run's own statistics count.
    elsewhere = folder(tmp_path / "told", latents_mean=MEAN, latents_std=DEVIATION)
    renamed = generate(model, range(3), steps=2, vae=f"e2e-sdvae={elsewhere}").collect()
    assert torch.equal(renamed.images, samples.images)
    bare = generate(model, range(3), steps=2, vae=load_vae(made.name)).collect()
    assert torch.equal(bare.images, samples.images)
    for form in ("diffusers", "safetensors"):
        passed_on = from_pretrained(export(tmp_path / "run", tmp_path / form, format=form))
        again = generate(passed_on, range(3), steps=2).collect()
        assert (again.images.float() - samples.images).abs().max() <= 1


def test_nobody_decodes_with_a_scale_that_is_not_known(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="has no latent statistics"):
        load_vae(made.name).decode(torch.zeros(1, CHANNELS, 8, 8))
    args = ["prepare", str(made.root / "set"), "--out", str(tmp_path / "x"), "--online"]
    assert main([*args, "--vae", made.name, "--image-size", "16"]) == 2
    assert "leave --online out" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_channel_that_never_changes_has_no_scale(made: SimpleNamespace, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(made.root / "vae", tmp_path / "vae"))
    network = load_vae(made.name).network
    network.quant_conv.weight.data[[1, 1 + CHANNELS]] = 0
    network.quant_conv.bias.data[1 + CHANNELS] = -60.0
    network.save_pretrained(weights)
    with pytest.raises(ValueError, match="channel 1 of the latents is the same everywhere"):
        make(made.root / "set", tmp_path / "x", f"e2e-sdvae={weights}", **made.how)


def test_a_loader_reads_what_was_measured(made: SimpleNamespace) -> None:
    cache = Cache.open(made.cache.path)
    batch = Loader(cache, seed=0, features=[TEACHER]).batch(range(24))
    assert batch.mean.mean((0, 2, 3)).abs().max() < 1e-3
