"""Encoding while training: the same rows as a cache of the same images, and nothing stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from erw.cli import main
from erw.data import Cache, Loader
from erw.data.on_the_fly import Online, write
from erw.encoders import load_encoder
from erw.errors import CacheError, DataError, ErwError
from helpers.hostile import variants
from helpers.parts import ENCODER, make, photos, vae_folder

SHARE = {"image_size": 32, "seed": 3, "flip": True}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, Cache, Path]:
    """A stored cache, the same online in float32, and the folder of images."""
    root = tmp_path_factory.mktemp("online")
    folder, vae = photos(root / "set"), vae_folder(root / "vae")
    stored = make(folder, root / "stored", vae, encoder=True, **SHARE)
    online = write(
        folder, root / "online", vae=str(vae), encoders=[ENCODER], precision="float32", **SHARE
    )
    return stored, online, folder


def test_rows_are_those_of_a_cache(both: tuple[Cache, Cache, Path]) -> None:
    stored, online, _ = both
    assert isinstance(Cache.open(online.path), Online)
    assert [p.name for p in online.path.iterdir()] == ["online.json"]
    assert len(online) == len(stored) and online.class_names == stored.class_names
    assert online.features == stored.features
    a, b = (Loader(c, seed=5, features=[ENCODER]).batch(range(20, 32)) for c in (stored, online))
    assert torch.equal(a.labels, b.labels)
    for one, two in ((a.mean, b.mean), (a.std, b.std), (a.features[0], b.features[0])):
        torch.testing.assert_close(one, two, atol=5e-3, rtol=5e-3)
    part = Loader(online, seed=5, features=[ENCODER]).batch(range(23, 27))
    torch.testing.assert_close(part.mean, b.mean[3:7], atol=1e-4, rtol=1e-4)
    assert np.array_equal(online.images([2, 9]), make_images([2, 9], both[2]))


def make_images(rows: list[int], folder: Path) -> np.ndarray:
    from erw.data import open_source
    from erw.data.images import crop

    source = open_source(folder)
    found = [crop(source[i][0], 32) for i in rows]
    return np.stack(found).transpose(0, 3, 1, 2)


def test_the_teacher_does_not_run_where_its_features_are_not_requested(
    both: tuple[Cache, Cache, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = Cache.open(both[1].path)
    online.read([0], features=[ENCODER])
    monkeypatch.setattr(type(load_encoder(ENCODER)), "forward", None)
    assert torch.equal(online.read([0, 1]).mean, both[1].read([0, 1]).mean)
    with pytest.raises(TypeError):
        online.read([0], features=[ENCODER])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    mine = photos(tmp_path / "mine", each=2)
    own = write(mine, tmp_path / "own", vae="none", image_size=32)
    with pytest.raises(CacheError, match=r"other settings: image_size \(32, now 40\)"):
        write(mine, own.path, vae="none", image_size=40)
    with pytest.raises(CacheError, match="not empty"):
        write(mine, mine, vae="none", image_size=32)
    (mine / "apple" / "000.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"000\.png.*without --online"):
        own.read([0])
    with pytest.raises(CacheError, match="have changed"):
        Cache.open(tmp_path / "own")


def test_a_recipe_that_a_stranger_wrote(tmp_path: Path) -> None:
    """Rows, or one line that says what is wrong."""
    mine = photos(tmp_path / "mine", each=1)
    online = write(mine, tmp_path / "own", vae="none", encoders=[ENCODER], image_size=32)
    recipe, refused = json.loads((online.path / "online.json").read_text()), 0
    for what, changed in variants(recipe):
        (online.path / "online.json").write_text(json.dumps(changed))
        try:
            again = Cache.open(online.path)
            if what.startswith(("vae", "encoders")):  # names, which are looked up when it is read
                again.read([0], features=again.features)
        except ErwError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error).replace(str(tmp_path), "")) < 700, what
    assert refused > 250


def test_training_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", each=4)
    assert main(["prepare", "photos", "--out", "cache/photos", "--online"]) == 0
    train = ["train", "debug", "--data.cache", "cache/photos", "--out", "runs/photos", "--tiny"]
    assert main([*train, "--steps", "3", "--plan.warmup", "1", "--log.every", "1"]) == 0
    assert main(["prepare", "photos", "--out", "cache/photos", "--online"]) == 0
