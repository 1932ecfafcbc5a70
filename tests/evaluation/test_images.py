"""What evaluation takes: caches by their images; and every bad set of images in one clear line."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from erw import evaluate
from erw.cli import main
from erw.data.cache import Cache
from erw.data.on_the_fly import write as write_online
from erw.errors import CacheError, DataError, NumericsError
from erw.evaluation.images import image_set
from erw.sampling.generation import generate
from helpers.images import Pixels, pictures, save_pngs
from helpers.parts import make, photos
from helpers.pixels import MODEL


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Of the same photos: with images, without, and one that encodes while training."""
    folder = tmp_path_factory.mktemp("caches")
    photos(folder / "photos")
    make(folder / "photos", folder / "with", "none", images=True)
    make(folder / "photos", folder / "without", "none")
    write_online(str(folder / "photos"), folder / "online", vae="none", encoders=(), image_size=32)
    return folder / "with", folder / "without", folder / "online"


def test_a_cache_stands_for_its_images(caches: tuple[Path, Path, Path], tmp_path: Path) -> None:
    kept, bare, online = caches
    cache = Cache.open(kept)
    held = cache.images(range(len(cache)))
    assert len(held) == 24 and held.shape[2:] == (32, 32)
    images = pictures(30, side=32)
    expected = evaluate(images, reference=held, encoder=Pixels(), cache=tmp_path)
    for reference in (kept, str(kept), cache, online):
        found = evaluate(images, reference=reference, encoder=Pixels(), cache=tmp_path)
        assert found["fd-lite2"] == pytest.approx(expected["fd-lite2"], rel=1e-9), reference
        assert found.reference_count == 24 and found.reference_hash
    assert torch.equal(torch.cat(list(image_set(kept).batches(5, 7, 19))), held[7:19])
    with pytest.raises(CacheError, match=r"holds no images: .* --images"):
        evaluate(images, reference=bare, encoder=Pixels(), cache=tmp_path)


def png(path: Path, *, size: tuple[int, int]) -> None:
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another size": (lambda f: png(f / "9.png", size=(16, 8)), ("9.png is 16 x 8", "8 x 8")),
    "cut short": (lambda f: cut(f / "003.png"), ("003.png", "truncated")),
    "no image": (lambda f: (f / "9.png").write_text("x"), ("9.png", "not an image")),
}


def refused(images: object, reference: object) -> str:
    """The one line that says why these cannot be scored."""
    with pytest.raises(DataError) as raised:
        evaluate(images, reference=reference, encoder=Pixels())
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_in_one_line(case: str, tmp_path: Path) -> None:
    good, bad = save_pngs(tmp_path / "good", pictures(5)), save_pngs(tmp_path / "bad", pictures(5))
    spoil, words = BAD[case]
    spoil(bad)
    for line in (refused(bad, good), refused(good, bad)):
        assert all(word in line for word in words), line


def test_the_command_line_says_it_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, big = (
        save_pngs(tmp_path / "a", pictures(3)),
        save_pngs(tmp_path / "b", pictures(3, side=9)),
    )
    assert main(["eval", str(good), "--reference", str(big)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: images a are 8 x 8, the reference b is 9 x 9")


ARRAYS = {
    "NaN": (np.full((4, 8, 8, 3), np.nan, np.float32), "float32 (4, 8, 8, 3); expected uint8"),
    "channels first": (np.zeros((4, 3, 8, 8), np.uint8), "expected uint8 (N, H, W, 3)"),
    "grey": (np.zeros((4, 8, 8, 1), np.uint8), "expected uint8 (N, H, W, 3)"),
    "with alpha": (np.zeros((4, 8, 8, 4), np.uint8), "expected uint8 (N, H, W, 3)"),
    "one": (np.zeros((1, 8, 8, 3), np.uint8), "1 of them; statistics need at least 2"),
    "none": (np.zeros((0, 8, 8, 3), np.uint8), "0 of them; statistics need at least 2"),
    "large": (np.zeros((4, 16, 16, 3), np.uint8), "16 x 16"),
    "Fortran": (
        np.zeros((8, 8, 8, 3), np.uint8, order="F"),
        "uint8 (8, 8, 8, 3) in Fortran order; expected uint8 (N, H, W, 3) in C order",
    ),
    "objects": (np.array([{}], dtype=object), "expected uint8 (N, H, W, 3)"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_bad_arrays_are_told_in_one_line(case: str, tmp_path: Path) -> None:
    array, words = ARRAYS[case]
    np.savez(tmp_path / "bad.npz", arr_0=array)
    for line in (
        refused(tmp_path / "bad.npz", pictures()),
        refused(pictures(), tmp_path / "bad.npz"),
    ):
        assert words in line, line


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", arr_0=pictures(5).permute(0, 2, 3, 1).numpy())
    data = bytearray((tmp_path / "bad.npz").read_bytes())
    data[500] ^= 1
    (tmp_path / "bad.npz").write_bytes(data)
    assert "damaged" in refused(tmp_path / "bad.npz", pictures())


def test_samples_that_are_not_finite_are_no_images() -> None:
    net = copy.deepcopy(MODEL.net)
    for parameter in net.parameters():
        parameter.data.fill_(torch.nan)
    drawn = generate(replace(MODEL, net=net), range(4), steps=2)
    with pytest.raises(NumericsError, match="samples of seeds 0, 1, 2, 3 are not finite"):
        evaluate(drawn, reference=pictures(), encoder=Pixels())
