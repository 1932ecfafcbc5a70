"""Vision encoders and VAEs: shapes, preprocessing, scaling, and errors that say what to do."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from erw.data.networks import weight_hash
from erw.data.sources.openmoji import OpenMojiSet
from erw.encoders import VAE, Encoder, ModuleEncoder, load_encoder, load_vae
from erw.encoders.efficientnet import _pretrained
from erw.encoders.vae import SHIPPED
from erw.errors import CheckpointError, ConfigError, DataError

NAME = "openmoji-f4c4"


def images(split: str, count: int, size: int = 64) -> torch.Tensor:
    source = OpenMojiSet(split, size=size, count=count)
    return torch.from_numpy(np.stack([source[i][0] for i in range(count)])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=["efficientnet-lite0", "efficientnet-lite2"])
def encoder(request) -> Encoder:
    return load_encoder(request.param)


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_vae(NAME)


def test_patch_tokens_follow_the_grid(encoder):
    tokens = encoder(images("test", 4))
    assert encoder.grid(64) == (8, 8)
    assert tokens.shape == (4, 64, encoder.dim) and tokens.dtype == torch.float32
    assert encoder.dim == {"efficientnet-lite0": 112, "efficientnet-lite2": 120}[encoder.name]
    assert not tokens.requires_grad


def test_tokens_are_row_major():
    encoder = load_encoder("efficientnet-lite0")
    blank = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    marked = blank.clone()
    marked[..., 4:12, 52:60] = 0  # row 0 to 1, column 6 to 7 of the 8 x 8 grid
    change = (encoder(marked) - encoder(blank)).norm(dim=-1).view(8, 8)
    row, column = divmod(int(change.argmax()), 8)
    assert row <= 2 and column >= 5


def test_same_numbers_as_the_packages_network(encoder):
    """Folded batch norms and merged padding change nothing but speed."""
    batch = images("test", 4, size=128)
    network = _pretrained(int(encoder.name[-1]))
    with torch.no_grad():
        wanted = network.extract_features((batch.float() - 127) / 128).mean((2, 3))
    pooled = encoder.pooled(batch)
    assert pooled.shape == (4, encoder.dim_pooled) == (4, 1280)
    torch.testing.assert_close(pooled, wanted, atol=1e-3, rtol=1e-3)


def test_preprocessing_classifies_a_football():
    """(x - 127) / 128 on a white ground: ImageNet class 805 is the soccer ball."""
    encoder, network = load_encoder("efficientnet-lite0@224"), _pretrained(0)
    glyph = torch.from_numpy(football(224)).permute(2, 0, 1)[None]
    with torch.no_grad():
        classes = network._fc(encoder.pooled(glyph)).softmax(-1)
    assert classes.argmax() == 805 and classes.max() > 0.5


def football(side: int) -> np.ndarray:
    from erw.data.sources.openmoji import _rasterise

    glyph = _rasterise("26BD", side).astype(np.int64)
    return (glyph[..., :3] + 255 - glyph[..., 3:]).astype(np.uint8)


def test_features_do_not_depend_on_the_batch_or_on_train_mode(encoder):
    batch = images("test", 3)
    alone = torch.cat([encoder(image[None]) for image in batch])
    encoder.train()
    torch.testing.assert_close(encoder(batch), alone, atol=1e-3, rtol=1e-3)
    assert not encoder.training


def test_flops_count_only_what_runs(encoder):
    patch, pooled = encoder.flops(64), encoder.flops(64, pooled=True)
    assert 1e8 < patch < pooled < 5e8
    assert load_encoder(f"{encoder.name}@256").flops(64) == pytest.approx(4 * patch, rel=0.01)


def test_encoder_by_name():
    assert load_encoder("efficientnet-lite0@192").grid(64) == (12, 12)
    with pytest.raises(ConfigError, match="did you mean 'efficientnet-lite0'"):
        load_encoder("efficientnet_lite0")
    with pytest.raises(ConfigError, match="choose from"):
        load_encoder("zzz")
    with pytest.raises(ConfigError, match="side in pixels"):
        load_encoder("efficientnet-lite0@big")
    with pytest.raises(ConfigError, match="multiple of its patch, 16"):
        load_encoder("efficientnet-lite0@100")


def test_encoder_refuses_other_images(encoder):
    with pytest.raises(DataError, match="uint8"):
        encoder(torch.zeros(1, 3, 64, 64))
    with pytest.raises(DataError, match="squares"):
        encoder(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))
    with pytest.raises(DataError, match="cannot tile"):
        encoder.grid(61)


def test_shipped_vae_round_trip(vae):
    held_out = images("test", 72)
    moments = vae.encode(held_out)
    assert moments.shape == (72, 8, 16, 16) and moments.dtype == torch.float32
    assert (vae.channels, vae.factor) == (4, 4)
    mean, deviation = moments.chunk(2, 1)
    assert (deviation > 0).all()
    made = vae.decode((mean - vae.shift) * vae.scale)
    assert made.shape == held_out.shape and made.dtype == torch.uint8
    error = (made.float() - held_out.float()).square().mean((1, 2, 3))
    assert (10 * (255**2 / error).log10()).mean() > 27


def test_scaled_latents_have_zero_mean_and_unit_deviation(vae):
    mean, deviation = vae.encode(images("train", 180)).chunk(2, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = (mean + deviation * noise - vae.shift) * vae.scale
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_no_vae_is_an_exact_round_trip():
    pixels = load_vae("none")
    batch = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch[0, 0] = torch.arange(64).view(8, 8)
    mean, deviation = pixels.encode(batch).chunk(2, 1)
    assert (pixels.channels, pixels.factor) == (3, 1)
    assert mean.abs().max() <= 1 and (deviation == 0).all()
    assert torch.equal(pixels.decode((mean - pixels.shift) * pixels.scale), batch)


def test_any_diffusers_folder_with_its_own_scaling(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3,
        scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "own")
    own = load_vae(tmp_path / "own")
    assert (own.channels, own.factor) == (3, 2)
    assert own.scale.flatten().tolist() == [0.5] * 3 and own.shift.flatten().tolist() == [0.25] * 3
    batch = images("test", 2)
    mean, _ = own.encode(batch).chunk(2, 1)
    with torch.no_grad():
        wanted = network.encode(batch.float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(mean, wanted, atol=1e-5, rtol=1e-4)


def copy_of_shipped(folder):
    shutil.copytree(SHIPPED / NAME, folder)
    return folder / "config.json", folder / "diffusion_pytorch_model.safetensors"


def test_vae_errors_name_the_cause(tmp_path):
    with pytest.raises(ConfigError, match=f"unknown VAE 'openmojo': choose from {NAME}, none"):
        load_vae("openmojo")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_vae(tmp_path)

    config, weights = copy_of_shipped(tmp_path / "cut")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_vae(tmp_path / "cut")

    config, _ = copy_of_shipped(tmp_path / "kind")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet"}))
    with pytest.raises(CheckpointError, match="expected an AutoencoderKL"):
        load_vae(tmp_path / "kind")

    config, _ = copy_of_shipped(tmp_path / "list")
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list: expected a JSON object"):
        load_vae(tmp_path / "list")

    config, _ = copy_of_shipped(tmp_path / "deeper")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 2}))
    with pytest.raises(CheckpointError, match="48 are missing, extra or"):
        load_vae(tmp_path / "deeper")

    config, _ = copy_of_shipped(tmp_path / "scaling")
    settings = json.loads(config.read_text())
    del settings["scaling_factor"]
    config.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="no scaling_factor"):
        load_vae(tmp_path / "scaling")


def test_vae_refuses_other_tensors(vae):
    with pytest.raises(DataError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(DataError, match="4 divides"):
        vae.encode(torch.zeros(1, 3, 62, 62, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"expects \(B, 4, h, w\)"):
        vae.decode(torch.zeros(1, 3, 16, 16))


def test_a_module_of_the_current_folder(tmp_path, monkeypatch):
    """A console script has the folder of the script on its path, and not the current one."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p) != tmp_path])
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
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
    assert sys.path == before


def test_normalisation_and_patch_of_a_module_are_part_of_its_hash():
    module = torch.nn.AdaptiveAvgPool2d(
        4
    )  # no weights: all that tells one from another is beside it
    plain = ModuleEncoder("pool", module, dim=3)
    assert not plain.state_dict()  # hashes of caches with the defaults stay what they were
    assert plain.flops(64) == 0
    others = {"mean": (0.5,) * 3}, {"std": (0.5,) * 3}, {"patch": 8}
    hashes = [weight_hash(ModuleEncoder("pool", module, dim=3, **how)) for how in others]
    assert len({weight_hash(plain), *hashes}) == 4
