"""Memorised samples are found, with the training image that they repeat; new ones are not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from erw.errors import DataError
from erw.evaluate.memory import memorisation, pairs_picture
from test_evaluate import pictures, save_pngs


class Centred:
    """Pixels about grey: features of random pictures point in all directions."""

    name = "centred"

    def pooled(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() - 127.5


def test_copies_are_found_and_new_images_are_not() -> None:
    training, held_out = pictures(90, seed=1), pictures(70, seed=2)
    copies = [40, 3, 77, 12]
    samples = torch.cat([pictures(12, seed=3), training[copies]])
    found = memorisation(
        samples, training=training, held_out=held_out, encoder=Centred(), batch_size=16
    )
    assert found.index[-4:].tolist() == copies
    assert (found.distance[-4:] < 1e-5).all() and (found.distance[:12] > 0.3).all()
    assert found.suspicious == pytest.approx(4 / 16, abs=1.1 / 16)
    record = found.to_dict(top=4)
    assert {pair["image"] for pair in record["nearest"]} == set(copies)
    assert record["samples"]["least"] < 1e-5 < record["held_out"]["least"]


def test_every_nearest_is_that_of_a_full_search() -> None:
    training, samples = pictures(50, seed=1), pictures(9, seed=2)
    found = memorisation(samples, training=training, encoder=Centred(), batch_size=7)
    a, b = (torch.nn.functional.normalize(Centred().pooled(x), dim=1) for x in (samples, training))
    value, where = (a @ b.T).max(1)
    assert torch.equal(found.index, where)
    torch.testing.assert_close(found.distance, 1 - value)
    assert found.usual is None and found.to_dict()["held_out"] is None


def test_the_picture_has_each_sample_over_its_image(tmp_path: Path) -> None:
    training = save_pngs(tmp_path / "train", pictures(20, seed=1))
    samples = pictures(20, seed=1)[[7, 2, 9]]
    found = memorisation(samples, training=training, encoder=Centred())
    picture = pairs_picture(samples, training, found, columns=3)
    assert picture.shape == (3, 16, 24) and picture.dtype == torch.uint8
    assert torch.equal(picture[:, :8], picture[:, 8:])
    with pytest.raises(DataError, match="one size"):
        pairs_picture(pictures(3, side=16), training, found)
