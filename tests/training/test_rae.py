"""A representation autoencoder in place of a VAE, from images to images, on the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erw.cli import main
from erw.config import from_dict, to_dict
from erw.data import Cache
from erw.encoders import load_vae
from erw.interop import open_model
from erw.sampling import generate
from erw.training import load
from helpers.parts import photos
from helpers.rae import rae

SMALL = ["--tiny", "--model.patch", "1", "--steps", "4", "--log.checkpoint", "4"]


def erw(*args: object) -> None:
    assert main([str(arg) for arg in args]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe's twin on photos, prepared with an autoencoder of 16 px."""
    root = tmp_path_factory.mktemp("rae")
    rae(root / "vae")
    photos(root / "set", each=4)
    vae = f"rae-dinov2-b={root / 'vae'}"
    size = ["--image-size", "16", "--vae", vae, "--encoders"]
    erw("prepare", root / "set", "--out", root / "cache", *size)
    erw("train", "sit_xl1_in256_rae", "--data.cache", root / "cache", "--out", root / "run", *SMALL)
    return root / "run"


def test_what_is_prepared_trained_and_drawn(run: Path, tmp_path: Path) -> None:
    cache, vae = Cache.open(run.parent / "cache"), load_vae(run.parent / "vae")
    assert cache.latent_shape == (64, 4, 4) and cache.vae["weight_hash"] == vae.weight_hash
    assert not cache.scaling
    pixels = [Image.open(p).convert("RGB") for p in sorted((run.parent / "set").rglob("*.*"))]
    assert len(cache) == len(pixels) == 12
    batch = cache.read(range(12))
    assert not batch.std.any() and abs(batch.mean.mean()) < 1
    # A row decodes to the autoencoder's reconstruction of its image.
    erw("prepare", run.parent / "set", "--out", tmp_path / "kept", "--images", "--image-size", 16,
        "--vae", run.parent / "vae", "--encoders")  # fmt: skip
    kept = Cache.open(tmp_path / "kept")
    images = kept.columns(["image"], range(12))["image"]
    rebuilt = vae.decode(vae.encode(images).chunk(2, 1)[0])
    assert (vae.decode(batch.mean).float() - rebuilt.float()).abs().max() <= 2  # float16 rows
    model = load(run)
    assert model.run.model.head_depth == 1 and model.net.latent_shape == (64, 4, 4)
    assert model.run.flow.shift == pytest.approx(48**0.5)
    drawn = generate(model, range(2)).collect()
    assert drawn.images.shape == (2, 3, 16, 16) and drawn.images.dtype == torch.uint8
    erw("sample", run, "--out", tmp_path / "drawn", "--seeds", "0:2")
    saved = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "drawn").rglob("*.png"))]
    assert any((drawn.images[0].permute(1, 2, 0).numpy() == image).all() for image in saved)


def test_another_image_size_is_refused_before_any_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    args = ["prepare", run.parent / "set", "--out", out, "--vae", run.parent / "vae", "--encoders"]
    assert main([*map(str, args), "--image-size", "64"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "needs --image-size 16, not 64" in error
    assert not out.exists()


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_an_export_draws_the_same(run: Path, tmp_path: Path, form: str) -> None:
    model, out = load(run), tmp_path / form
    erw("export", run, "--out", out, "--format", form, "--vae", run.parent / "vae")
    back = open_model(out)
    assert from_dict(type(model.run), to_dict(back.run)).model == model.run.model
    wanted = generate(model, range(2), steps=2, solver="euler").collect().images
    got = generate(back, range(2), steps=2, solver="euler").collect().images
    assert torch.equal(got, wanted)
    if form == "diffusers":
        from diffusers import AutoencoderRAE

        from erw.interop.exported.pipeline import FlowPipeline

        index = json.loads((out / "model_index.json").read_text())
        assert index["vae"] == ["diffusers", "AutoencoderRAE"]
        pipe = FlowPipeline(None, AutoencoderRAE.from_pretrained(out / "vae").requires_grad_(False))
        latents = generate(model, range(2), decode=False).collect().latents
        decoded = pipe._decode(latents, "np")
        wanted = generate(model, range(2)).collect().images.permute(0, 2, 3, 1).numpy()
        assert np.abs(255 * decoded - wanted).max() <= 1
