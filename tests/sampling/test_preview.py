"""Previews: the same samples at every look, and training does not notice."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from erw.cli import main
from erw.sampling import generate
from erw.sampling.preview import CAPTION, COUNT, picture, spread
from erw.training import load
from erw.training.checkpoint import paths
from helpers.tiny import tiny_cache, tiny_run
from helpers.training import go


def opened(png: bytes | Path) -> np.ndarray:
    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return np.asarray(image.convert("RGBA"))


def test_a_grid_with_names_and_without() -> None:
    images = torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8)
    plain = opened(picture(images, columns=3))
    assert plain.shape == (44, 98, 4)
    assert np.array_equal(plain[24:, 34:64, :3], images[4].permute(1, 2, 0).numpy())
    assert plain[22, 0, 3] == 0  # a gap
    names = ["a", "", "long " * 9, "d", "e"]
    captioned = opened(picture(images, range(5), names, columns=3))
    assert captioned.shape == (2 * (60 + CAPTION) + 4, 3 * 90 + 8, 4)  # three times as large
    assert np.array_equal(captioned[:60:3, :90:3, :3], images[0].permute(1, 2, 0).numpy())
    captions = [captioned[60 : 60 + CAPTION, left : left + 90, 3] for left in (0, 94, 188)]
    assert captions[0].max() > 200 and captions[1].max() == 0
    assert (captions[2].max(axis=0) > 0).sum() > 40  # cut to its width, not spilling
    assert captioned[60 : 60 + CAPTION, 184:188, 3].max() == 0


def test_classes_are_spread() -> None:
    assert spread([]) is None and spread(range(3), 4) == [0, 1, 2, 0]
    assert spread(range(1000), 4) == [0, 250, 500, 750] and spread([1, 7], 3) == [1, 7, 1]


def test_previews_change_nothing_and_show_the_same_samples(tmp_path: Path) -> None:
    cache = tiny_cache(tmp_path / "cache", count=16).path
    plain, previewed = tmp_path / "plain", tmp_path / "previewed"
    go(tiny_run(cache), plain)
    size = ["--model.patch", "8", "--data.cache", str(cache), "--optim.precision", "fp32"]
    argv = ["train", "debug", "--out", str(previewed), "--log.preview", "5", *size]
    assert main(argv) == 0
    a, b = (load_file(paths(out / "checkpoints")[-1]) for out in (plain, previewed))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    names = sorted(path.name for path in (previewed / "previews").glob("*.png"))
    assert names == [f"step-{step:08d}.png" for step in (5, 10, 12)]  # not in warm-up
    last = opened(previewed / "previews" / names[-1])
    model = load(previewed)
    options = dataclasses.asdict(model.run.sample)
    labels = spread(model.usual_classes)
    images = generate(model, range(COUNT), labels, **options, precision="auto").collect().images
    assert np.array_equal(last[:80:5, :80:5, :3], images[0].permute(1, 2, 0).numpy())

    out = tmp_path / "set.npz"
    argv = ["sample", str(previewed), "--out", str(out), "--preview", "--seeds", "0:6"]
    assert main([*argv, "--steps", "1", "--solver", "euler", "--labels", "random"]) == 0
    with np.load(out) as arrays:
        first = arrays["arr_0"][0]
    assert np.array_equal(opened(tmp_path / "set-preview.png")[:80:5, :80:5, :3], first)
