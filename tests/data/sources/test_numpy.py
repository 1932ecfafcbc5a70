"""Images in NumPy arrays: labels, shapes, and files that are damaged."""

from pathlib import Path

import numpy as np
import pytest

from erw.data import open_source
from erw.data.sources.tables import Arrays
from erw.errors import DataError
from helpers.parts import picture


def test_arrays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)
    labels = np.array([0, 2, 1, 0, 1, 2])
    np.save(tmp_path / "x.npy", pixels)
    bare = open_source(tmp_path / "x.npy")
    assert bare.class_names == () and np.array_equal(bare[4][0], pixels[4])
    np.save(tmp_path / "x_labels.npy", labels)
    np.savez(tmp_path / "y.npz", images=pixels, labels=labels)
    for name in ("x.npy", "y.npz"):
        source = open_source(tmp_path / name)
        assert source.class_names == tuple("012") and len(source) == 6
        assert [source[i][1] for i in range(6)] == labels.tolist()
        assert np.array_equal(source[1][0], pixels[1])
        assert source.fingerprint() != bare.fingerprint()
    np.save(tmp_path / "grey.npy", pixels[..., 0])
    grey = open_source(tmp_path / "grey.npy")[0][0]
    assert np.array_equal(grey, np.repeat(pixels[0, :, :, :1], 3, axis=2))
    np.save(tmp_path / "float.npy", pixels / 255)
    with pytest.raises(DataError, match=r"float64 .*expected uint8"):
        open_source(tmp_path / "float.npy")
    np.save(tmp_path / "x_labels.npy", labels[:3])
    with pytest.raises(DataError, match=r"expected \(6,\)"):
        open_source(tmp_path / "x.npy")


@pytest.mark.parametrize("harm", ["short", "flipped"])
def test_damaged_arrays(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "X.NPZ"
    with path.open("wb") as file:
        np.savez_compressed(file, images=np.stack([picture(0)] * 4))
    assert len(Arrays(path)) == 4
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: len(data) // 2] if harm == "short" else data)
    with pytest.raises(DataError, match=r"X\.NPZ (cannot be read as NumPy|is no \.npz)"):
        Arrays(path)


def test_labels_by_other_names_and_arrays_in_fortran_order(tmp_path: Path) -> None:
    pixels = np.stack([picture(i) for i in range(3)])
    for name in ("arr_1", "targets"):
        np.savez(tmp_path / "x.npz", **{"arr_0": np.asfortranarray(pixels), name: [2, 0, 1]})
        source = Arrays(tmp_path / "x.npz")
        assert source.labels.tolist() == [2, 0, 1]
        assert np.array_equal(source[1][0], pixels[1])
    np.save(tmp_path / "x.npy", np.asfortranarray(pixels))
    image = Arrays(tmp_path / "x.npy")[2][0]
    assert np.array_equal(image, pixels[2]) and image.flags.c_contiguous


def test_one_image_is_no_set_of_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", picture(0))
    with pytest.raises(
        DataError, match=r"holds uint8 \(40, 52, 3\): expected .*, also of one image"
    ):
        Arrays(tmp_path / "x.npy")


def test_arrays_that_are_no_labels_are_named(tmp_path: Path) -> None:
    pixels = np.stack([picture(0)] * 2)
    np.savez(tmp_path / "x.npz", images=pixels, species=[0, 1], ids=[5, 6])
    assert open_source(tmp_path / "x.npz").class_names == ()
    note = 'arrays species, ids are not used: name one of them "labels" to take it as label'
    assert open_source(tmp_path / "x.npz").notes == [note]
    assert not open_source(tmp_path / "x.npz", classes="none").notes
    np.savez(tmp_path / "x.npz", images=pixels, labels=[0, 1], ids=[5, 6])
    assert not open_source(tmp_path / "x.npz").notes


def test_labels_of_another_name_beside_arrays_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.stack([picture(0)] * 2))
    np.save(tmp_path / "labels.npy", [0, 1])
    note = "labels.npy is not used: labels are in x_labels.npy"
    assert open_source(tmp_path / "x.npy").notes == [note]
    (tmp_path / "labels.npy").rename(tmp_path / "x_labels.npy")
    assert open_source(tmp_path / "x.npy").class_names == ("0", "1")


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x_labels.npy"])
def test_text_that_is_named_as_arrays(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", np.stack([picture(0)] * 2))
    (tmp_path / name).write_text("hello, this is text")
    with pytest.raises(DataError, match=name) as error:
        open_source(tmp_path / ("x.npz" if name == "x.npz" else "x.npy"))
    assert "pickle" not in str(error.value) and "get it again" in str(error.value)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"x\.npz cannot be .* \(it holds Python objects\)"):
        open_source(tmp_path / "x.npz")
