"""Crops: ADM's to the pixel, and what the others promise."""

from collections.abc import Callable

import numpy as np
import pytest

from erw.data.images import Unreadable, adm_center_crop, crop, random_crop
from erw.errors import DataError
from helpers.parts import picture

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize("size", [64, 256])
def test_adm_centre_crop_is_exact_to_the_pixel(golden: Golden, size: int) -> None:
    data = golden("adm_center_crop")
    assert np.array_equal(adm_center_crop(data["image"], size), data[f"crop{size}"])


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = picture(1, height=64, width=64)
    for kind in ("adm", "resize"):
        assert np.array_equal(crop(image, 64, kind=kind), image)


@pytest.mark.parametrize("kind", ["adm", "resize", "random"])
@pytest.mark.parametrize("shape", [(3, 500), (500, 3), (1, 1), (31, 33), (200, 100)])
def test_any_shape_gives_a_square(kind: str, shape: tuple[int, int]) -> None:
    image = picture(2, height=shape[0], width=shape[1])
    assert crop(image, 32, kind=kind).shape == (32, 32, 3)


def test_random_crops_follow_their_seed_and_reach_every_corner() -> None:
    y, x = np.mgrid[0:48, 0:64]
    image = np.stack([x * 4, y * 4, 0 * x], -1).astype(np.uint8)
    assert np.array_equal(random_crop(image, 32, seed=3), random_crop(image, 32, seed=3))
    middles = np.array([random_crop(image, 32, seed=s)[16, 16, :2] / 4.0 for s in range(300)])
    assert middles[:, 0].min() < 22 and middles[:, 0].max() > 42  # x of the centre: 20..44
    assert middles[:, 1].min() < 22 and middles[:, 1].max() > 26


def test_a_thread_of_pixels_cannot_fill_the_memory() -> None:
    with pytest.raises(Unreadable, match="too long and thin"):
        adm_center_crop(np.zeros((1, 60_000, 3), np.uint8), 256)


@pytest.mark.parametrize("kind", ["adm", "resize", "random"])
def test_an_image_without_pixels_is_rejected(kind: str) -> None:
    with pytest.raises(Unreadable, match="has no pixels"):
        crop(np.zeros((0, 4, 3), np.uint8), 32, kind=kind)


def test_an_unknown_crop_names_the_choices() -> None:
    with pytest.raises(DataError, match="adm, resize, random"):
        crop(picture(0), 32, kind="centre")
