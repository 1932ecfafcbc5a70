"""Memorised samples are found, with the training image that they repeat; new ones are not."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from erw.cli import main
from erw.evaluation.memorization import nearest_images
from helpers.images import pictures, save_pngs


class Centred:
    """Pixels about grey: features of random pictures point in all directions."""

    name = "centred"

    def pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() - 127.5


def test_copies_are_found_and_new_images_are_not() -> None:
    training, held_out = pictures(90, seed=1), pictures(70, seed=2)
    copies = [40, 3, 77, 12]
    samples = torch.cat([pictures(12, seed=3), training[copies]])
    found = nearest_images(
        samples, training=training, held_out=held_out, encoder=Centred(), batch_size=16
    )
    assert found.number[-4:].tolist() == copies
    assert (found.distance[-4:] < 1e-5).all() and (found.distance[:12] > 0.3).all()
    assert found.suspicious == pytest.approx(4 / 16, abs=1.1 / 16)
    assert found.usual is not None and found.usual.min() > 1e-5


def test_every_nearest_is_that_of_a_full_search() -> None:
    training, samples = pictures(50, seed=1), pictures(9, seed=2)
    found = nearest_images(samples, training=training, encoder=Centred(), batch_size=7)
    a, b = (torch.nn.functional.normalize(Centred().pooled(x), dim=1) for x in (samples, training))
    value, where = (a @ b.T).max(1)
    assert torch.equal(found.number, where)
    torch.testing.assert_close(found.distance, 1 - value)
    assert found.usual is None


def test_the_command_line_writes_distances_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = pictures(20, side=32, seed=1)
    samples = torch.cat([pictures(9, side=32), training[[7]]])
    paths = {"samples": samples, "train": training, "held": pictures(15, side=32, seed=2)}
    where = {name: str(save_pngs(tmp_path / name, held)) for name, held in paths.items()}
    asked = ["memory", where["samples"], "--training", where["train"]]
    assert main([*asked, "--held-out", where["held"], "--out", str(tmp_path / "found")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("least       0.0000   held out 0.") and "suspicious  " in said
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["nearest"][0]["sample"] == 9 and record["nearest"][0]["image"] == 7
    assert record["held_out"]["count"] == 15 and record["encoder_weights"]
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 7 * 32 and picture.height > 2 * 32
    assert main(asked) == 0 and "held out" not in capsys.readouterr().out
    assert main(asked[:2]) == 2 and "--training is missing" in capsys.readouterr().err
    save_pngs(tmp_path / "small", pictures(3))
    assert main([*asked[:3], str(tmp_path / "small")]) == 2
    assert "8 x 8" in capsys.readouterr().err
