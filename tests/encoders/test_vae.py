"""VAEs: the shipped one, none, by name and from folders; latents, scaling, and errors."""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from erw.encoders import VAE, load_vae
from erw.encoders import vae as vaes
from erw.encoders.names import SHIPPED
from erw.errors import CheckpointError, ConfigError, DataError
from helpers.images import glyphs
from helpers.rae import rae

NAME, FILE = "openmoji-f4c4", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae() -> VAE:
    return load_vae(NAME)


def test_shipped_vae_round_trip(vae: VAE) -> None:
    held_out = glyphs("test", 72)
    moments = vae.encode(held_out)
    assert moments.shape == (72, 8, 16, 16) and moments.dtype == torch.float32
    assert (vae.channels, vae.factor) == (4, 4)
    mean, deviation = moments.chunk(2, 1)
    assert (deviation > 0).all()
    made = vae.decode((mean - vae.shift) * vae.scale)
    assert made.shape == held_out.shape and made.dtype == torch.uint8
    error = (made.float() - held_out.float()).square().mean((1, 2, 3))
    assert (10 * (255**2 / error).log10()).mean() > 27


def test_scaled_latents_have_zero_mean_and_unit_deviation(vae: VAE) -> None:
    mean, deviation = vae.encode(glyphs("train", 180)).chunk(2, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    latents = (mean + deviation * noise - vae.shift) * vae.scale
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_no_vae_is_an_exact_round_trip() -> None:
    pixels = load_vae("none")
    batch = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch[0, 0] = torch.arange(64).view(8, 8)
    mean, deviation = pixels.encode(batch).chunk(2, 1)
    assert (pixels.channels, pixels.factor) == (3, 1)
    assert mean.abs().max() <= 1 and (deviation == 0).all()
    assert torch.equal(pixels.decode((mean - pixels.shift) * pixels.scale), batch)


def test_any_diffusers_folder_with_its_own_scaling(tmp_path: Path) -> None:
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
    batch = glyphs("test", 2)
    mean, _ = own.encode(batch).chunk(2, 1)
    with torch.no_grad():
        wanted = network.encode(batch.float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(mean, wanted, atol=1e-5, rtol=1e-4)


def copy_of_shipped(folder: Path) -> tuple[Path, Path]:
    shutil.copytree(SHIPPED[NAME], folder)
    return folder / "config.json", folder / "diffusion_pytorch_model.safetensors"


def test_vae_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"unknown VAE 'openmojo': choose from {NAME}, none"):
        load_vae("openmojo")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_vae(tmp_path)

    config, weights = copy_of_shipped(tmp_path / "cut")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="is truncated or not safetensors"):
        load_vae(tmp_path / "cut")

    config, _ = copy_of_shipped(tmp_path / "kind")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet"}))
    with pytest.raises(CheckpointError, match="expected an AutoencoderKL"):
        load_vae(tmp_path / "kind")

    config, _ = copy_of_shipped(tmp_path / "list")
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="is no JSON object"):
        load_vae(tmp_path / "list")

    config, _ = copy_of_shipped(tmp_path / "deeper")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"layers_per_block": 2}))
    with pytest.raises(CheckpointError, match="48 are missing, extra or"):
        load_vae(tmp_path / "deeper")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("norm_num_groups", -1, "norm_num_groups is -1, with 132 tensors"),
        ("norm_num_groups", 0, "does not fit its weights"),
        ("layers_per_block", 10**9, "layers_per_block is 1000000000, with 132 tensors"),
        ("layers_per_block", 1e9, "layers_per_block is 1000000000.0, with 132 tensors"),
        ("block_out_channels", [32, 10**9, 64], "with 132 tensors of 1,8"),
        ("block_out_channels", [32, 4096, 64], "numbers, the file 1,8"),
        ("latent_channels", -4, "does not fit its weights"),
        ("act_fn", "exec", "does not fit its weights"),
        ("down_block_types", ["os.system"] * 3, "does not fit its weights"),
        ("up_block_types", ["UpDecoderBlock2D"] * 2, "becomes|does not fit"),
        ("scaling_factor", 0, "positive deviations|no scaling that can be read"),
        ("scaling_factor", -1.0, "expected 4 means and positive deviations"),
        ("scaling_factor", "x", "no scaling that can be read"),
        ("scaling_factor", float("nan"), "expected 4 means and positive deviations"),
        ("latents_mean", ["x"] * 4, "no scaling that can be read"),
        ("latents_mean", [0.0] * 3, "expected 4 means"),
        ("latents_std", 7, "no scaling that can be read"),
    ],
)
def test_settings_of_a_strangers_vae(tmp_path: Path, key: str, value: Any, words: str) -> None:
    """One line that names the folder, before anything large is built."""
    config, _ = copy_of_shipped(tmp_path / "own")
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=words) as error:
        load_vae(tmp_path / "own")
    assert str(tmp_path / "own") in str(error.value) and "\n" not in str(error.value)


def test_a_tiny_autoencoder_that_enlarges(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path)  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    load_vae(tmp_path)
    for change in ({"upsampling_scaling_factor": 10**6}, {"out_channels": 10**9}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match="does not fit its weights"):
            load_vae(tmp_path)


def test_vae_refuses_other_tensors(vae: VAE) -> None:
    with pytest.raises(DataError, match="uint8"):
        vae.encode(torch.zeros(1, 3, 64, 64))


BLOCKS = {
    "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4,
}  # fmt: skip


def images(side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)


def kl(folder: Path, *, channels: int, quant: bool) -> Any:
    """A tiny AutoencoderKL: of 4 channels as Stable Diffusion's, of 16 as SD3's and Flux's."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        latent_channels=channels, use_quant_conv=quant, use_post_quant_conv=quant, **BLOCKS
    )
    network.save_pretrained(folder)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "channels", "quant", "scale", "shift"),
    [
        ("sd-vae-ft-ema", 4, True, 0.18215, 0.0),
        ("sd-vae-ft-mse", 4, True, 0.18215, 0.0),
        ("sdxl", 4, True, 0.13025, 0.0),
        ("sd3", 16, False, 1.5305, 0.0609),
        ("flux", 16, False, 0.3611, 0.1159),
    ],
)
def test_an_entry_owns_its_scaling(
    name: str, channels: int, quant: bool, scale: float, shift: float, tmp_path: Path
) -> None:
    network = kl(tmp_path / "weights", channels=channels, quant=quant)
    vae = load_vae(f"{name}={tmp_path / 'weights'}")
    assert (vae.channels, vae.factor) == (channels, 2)
    assert vae.scale.flatten().tolist() == pytest.approx([scale] * channels)
    assert vae.shift.flatten().tolist() == pytest.approx([shift] * channels)
    mean, deviation = vae.encode(images()).chunk(2, 1)
    with torch.no_grad():
        wanted = network.encode(images().float() / 127.5 - 1).latent_dist
        decoded = network.decode(wanted.mean).sample
    torch.testing.assert_close(mean, wanted.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(deviation, wanted.std, atol=1e-5, rtol=1e-4)
    pixels = vae.decode((mean - vae.shift) * vae.scale)
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255)
    assert (pixels.float() - expected).abs().max() <= 1


def test_a_tiny_autoencoder_has_no_deviation(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    network = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path / "taesd")
    vae = load_vae(f"taesd={tmp_path / 'taesd'}")
    assert (vae.channels, vae.factor, vae.scale.flatten().tolist()) == (4, 4, [1.0] * 4)
    mean, deviation = vae.encode(images()).chunk(2, 1)
    with torch.no_grad():
        wanted = network.encode(images().float() / 127.5 - 1).latents
        decoded = network.decode(wanted).sample
    torch.testing.assert_close(mean, wanted, atol=1e-5, rtol=1e-4)
    assert not deviation.any()
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255)
    assert (vae.decode(mean).float() - expected).abs().max() <= 1
    assert load_vae(tmp_path / "taesd").weight_hash == vae.weight_hash  # the folder alone will do


def test_by_name_from_the_hubs_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = {"hub": "someone/something@" + "a" * 40, "subfolder": "vae"}
    monkeypatch.setitem(vaes.ENTRIES, "sd3", vaes.ENTRIES["sd3"] | entry)
    with pytest.raises(CheckpointError, match=r"someone/something.*cannot be loaded.*sd3=FOLDER"):
        load_vae("sd3")
    kl(tmp_path / "models--someone--something/snapshots" / ("a" * 40) / "vae",
       channels=16, quant=False)  # fmt: skip
    refs = tmp_path / "models--someone--something/refs/main"
    refs.parent.mkdir()
    refs.write_text("a" * 40)
    vae = load_vae("sd3")
    assert vae.name == "sd3" and vae.channels == 16 and vae.revision == "a" * 40


def test_pinned_revisions_are_whole_commits() -> None:
    for name, entry in vaes.ENTRIES.items():
        pinned = re.search(r"@[0-9a-f]{40}$", entry["hub"])
        assert bool(pinned) != name.startswith(("e2e-", "rae-"))


def test_a_name_that_is_near_nothing() -> None:
    with pytest.raises(ConfigError, match=r"sd-vae-ft-ema.*va-vae=FILE"):
        load_vae("sd-vae-ft-emma")


@pytest.mark.parametrize(
    ("name", "kind"), [("rae-dinov2-b", "dinov2"), ("rae-mae-b", "mae"), ("", "mae")]
)
def test_a_representation_autoencoder(name: str, kind: str, tmp_path: Path) -> None:
    """Its latents are tokens after a last norm without gain, less their mean at each place."""
    network = rae(tmp_path / "weights", kind)
    vae = load_vae(f"{name}={tmp_path / 'weights'}" if name else tmp_path / "weights")
    assert (vae.channels, vae.factor, vae.side) == (64, 4, 16)
    assert vae.weight_hash == sha256((tmp_path / "weights" / FILE).read_bytes()).hexdigest()
    mean, deviation = vae.encode(images(16)).chunk(2, 1)
    assert mean.shape == (2, 64, 4, 4) and not deviation.any()
    assert torch.equal(mean, (mean - vae.shift) * vae.scale)  # the scaling is in its weights
    center, spread = (torch.tensor(network.config[f"latents_{k}"]) for k in ("mean", "std"))
    tokens = mean * (spread + 1e-5) + center
    normalised = torch.nn.functional.layer_norm(tokens.movedim(1, -1), (64,)).movedim(-1, 1)
    torch.testing.assert_close(tokens, normalised, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(mean, network.encode(images(16) / 255).latent)
        wanted = 255 * network.decode(mean).sample
    assert wanted.std() > 5
    pixels = vae.decode(mean).float()
    assert (pixels - wanted.clamp(0, 255)).abs().max() <= 0.51
    with pytest.raises(ConfigError, match="needs --image-size 16, not 32"):
        vae.encode(images(32))


OLD_NAMES = {  # of transformers 4, with which the released files were saved
    "dinov2": {
        "attention.q_proj": "attention.attention.query", "attention.k_proj":
        "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    },
    "mae": {
        "encoder.layers.": "encoder.encoder.layer.", "attention.q_proj":
        "attention.attention.query", "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value", "attention.o_proj":
        "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_a_representation_autoencoder_saved_by_older_libraries(kind: str, tmp_path: Path) -> None:
    rae(tmp_path, kind)
    wanted = load_vae(tmp_path).encode(images(16))
    state, renamed = load_file(tmp_path / FILE), 0
    for name in [name for name in state if name.startswith("encoder.")]:
        old = name
        for new, before in OLD_NAMES[kind].items():
            old = old.replace(new, before)
        renamed += old != name
        state[old] = state.pop(name)
    assert renamed == {"dinov2": 8, "mae": 16}[kind]
    state["decoder.decoder_pos_embed"] = torch.zeros(1, 17, 32)
    save_file(state, tmp_path / FILE)
    assert torch.equal(load_vae(tmp_path).encode(images(16)), wanted)


def test_a_damaged_representation_autoencoder(tmp_path: Path) -> None:
    rae(tmp_path)
    config, problems = json.loads((tmp_path / "config.json").read_text()), {
        "latents_mean": (None, "_latents_mean"),
        "encoder_num_hidden_layers": (2, r"encoder\.encoder\.layer\.1"),
        "decoder_hidden_size": ("x", "does not fit its weights"),
        "encoder_type": ("siglip9", "Unknown encoder_type='siglip9'"),
    }  # fmt: skip
    for key, (value, words) in problems.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=words) as error:
            load_vae(f"rae-dinov2-b={tmp_path}")
        assert "\n" not in str(error.value)
