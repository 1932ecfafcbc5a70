"""The tutorial on one's own folder holds: exactly its commands, on a small real folder."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erw.cli import main
from erw.data import Cache
from erw.data.sources.openmoji import _rasterise, groups

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "own-folder.md"
GLYPHS = ("animals-nature", "food-drink")


def photos(folder: Path, *, each: int = 6) -> Path:
    """Handwritten digits as PNG and drawn glyphs as JPEG, four classes, sizes that differ."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in (0, 1):
        (folder / f"digit-{label}").mkdir(parents=True)
        for i, pixels in enumerate(digits.images[digits.target == label][:each]):
            picture = Image.fromarray((255 - pixels * 15.9).astype(np.uint8))
            picture = picture.resize((80 + i, 96), Image.Resampling.BICUBIC)
            picture.save(folder / f"digit-{label}" / f"{i}.png")
    for name in GLYPHS:
        (folder / name).mkdir()
        for i, code in enumerate(groups()[name][:each]):
            glyph = _rasterise(code, 90 + i).astype(np.int64)  # premultiplied RGBA
            white = (glyph[..., :3] + 255 - glyph[..., 3:]).clip(0, 255).astype(np.uint8)
            Image.fromarray(white).save(folder / name / f"{i}.jpg", quality=95)
    return folder


def commands() -> list[list[str]]:
    """Every `erw` command of the tutorial, in order, without the program's name."""
    found = re.findall(r"^erw (.*)$", TUTORIAL.read_text("utf-8"), re.MULTILINE)
    assert [line.split()[0] for line in found] == ["prepare", "train", "sample"]
    return [line.split() for line in found]


def follow(extra: Sequence[str]) -> None:
    for command in commands():
        assert main([*command, *(extra if command[0] == "train" else [])]) == 0, command
    cache = Cache.open("cache/photos")
    assert cache.class_names == ("animals-nature", "digit-0", "digit-1", "food-drink")
    assert len(cache) == 24 and cache.manifest.rejected == 0
    drawn = sorted(Path("samples/photos").rglob("*.png"))
    assert len(drawn) == 16
    with Image.open(drawn[0]) as image:
        assert image.size == (64, 64)


def test_its_commands_work_on_a_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    follow(["--tiny"])
    assert main(["prepare", "photos", "--out", "cache/photos", "--verify"]) == 0
    assert "all 1 shards are whole" in capsys.readouterr().out
    shard = next(Path("cache/photos/shards").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    assert main(["prepare", "photos", "--out", "cache/photos", "--verify"]) == 2
    assert f"{shard.name} is cut short" in capsys.readouterr().err
    assert main(["prepare", "photos", "--out", "cache/photos"]) == 0


@pytest.mark.slow
def test_its_commands_work_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    follow([])
