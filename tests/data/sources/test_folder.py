"""Sources: order, labels and names of folders and zips; formats; what is rejected and why."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erw.data.images import Unreadable
from erw.data.sources import FileSource, Source, open_source
from erw.data.sources.openmoji import OpenMojiSet
from erw.errors import DataError
from helpers.archives import png, shades, tar
from helpers.parts import CLASSES, photos, picture


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def labels(source: Source) -> list[int]:
    return [source[i][1] for i in range(len(source))]


def test_class_folders_give_sorted_names_and_labels(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path / "set", each=4))
    assert isinstance(source, Source)
    assert source.class_names == CLASSES
    assert labels(source) == [0] * 4 + [1] * 4 + [2] * 4
    image, label = source[0]
    assert image.dtype == np.uint8 and image.shape == (40, 52, 3) and label == 0
    assert source.location(4) == str(tmp_path / "set" / "bear" / "000.png")


def test_classes_at_any_depth(tmp_path: Path) -> None:
    photos(tmp_path / "set" / "train", each=1)
    deep = tmp_path / "set" / "train" / "cup" / "blue" / "small"
    deep.mkdir(parents=True)
    Image.fromarray(picture(9)).save(deep / "one.png")
    auto = open_source(tmp_path / "set")  # train/ holds everything, so it is no class
    assert auto.class_names == CLASSES and labels(auto) == [0, 1, 2, 2]
    leaf = open_source(tmp_path / "set", classes="leaf")
    assert leaf.class_names[-1] == "train/cup/blue/small"
    assert open_source(tmp_path / "set", classes="none").class_names == ()


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    source = open_source(tmp_path)
    assert source.class_names == () and labels(source) == [0, 0, 0]


def test_images_beside_class_folders_are_ambiguous(tmp_path: Path) -> None:
    photos(tmp_path, each=1)
    Image.fromarray(picture(0)).save(tmp_path / "stray.png")
    with pytest.raises(DataError, match="1 images beside class folders"):
        open_source(tmp_path)
    assert len(open_source(tmp_path, classes="none")) == 4


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    photos(tmp_path / "real", each=2)
    (tmp_path / "set").mkdir()
    for name in CLASSES:
        os.symlink(tmp_path / "real" / name, tmp_path / "set" / name)
    os.symlink(tmp_path / "set", tmp_path / "set" / "cup" / "loop")
    assert len(open_source(tmp_path / "set")) == 6


def test_a_zip_equals_its_folder(tmp_path: Path) -> None:
    folder = open_source(photos(tmp_path / "set", each=3))
    archive = open_source(zipped(tmp_path / "set", tmp_path / "set.zip"))
    assert archive.class_names == folder.class_names and len(archive) == len(folder)
    for i in range(len(folder)):
        assert np.array_equal(archive[i][0], folder[i][0]) and archive[i][1] == folder[i][1]


def test_fingerprints_follow_names_sizes_and_labels(tmp_path: Path) -> None:
    folder = photos(tmp_path / "set", each=2)
    first = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == first
    assert open_source(folder, classes="none").fingerprint() != first
    Image.fromarray(picture(50)).save(folder / "cup" / "extra.png")
    assert open_source(folder).fingerprint() != first


def test_missing_empty_and_imageless_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images at"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images in .*expected images, or folders"):
        open_source(tmp_path / "empty")
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no images in .*1 \.txt"):
        open_source(tmp_path / "empty")
    (tmp_path / "file.bin").write_bytes(b"hello")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        open_source(tmp_path / "file.bin")
    with pytest.raises(DataError, match="auto, folders, leaf, none"):
        open_source(tmp_path, classes="all")


def test_other_files_are_counted(tmp_path: Path) -> None:
    (photos(tmp_path, each=1) / "cup" / "readme.txt").write_text("x")
    source = open_source(tmp_path)
    assert isinstance(source, FileSource) and source.notes == [
        "1 other files are left alone (1 .txt)"
    ]


def test_the_built_in_set_by_name() -> None:
    source = open_source("openmoji", count=20, size=32)
    assert isinstance(source, OpenMojiSet) and len(source) == 20
    assert open_source(source) is source


def test_photographs_of_two_lenses(tmp_path: Path) -> None:
    two = [Image.fromarray(picture(i)) for i in (0, 1)]
    two[0].save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=two[1:], quality=95)
    image = open_source(tmp_path)[0][0]
    assert np.abs(image.astype(int) - picture(0)).mean() < 3


def test_a_file_that_vanished_is_rejected(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path, each=1))
    (tmp_path / "bear" / "000.png").unlink()
    with pytest.raises(Unreadable, match="cannot be read"):
        source[1]


def test_a_link_to_nothing_is_rejected_and_an_empty_folder_is_no_class(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(1))
    (tmp_path / "c" / "1.png").write_bytes(png(1))
    (tmp_path / "c" / "2.png").symlink_to(tmp_path / "gone.png")
    source = open_source(tmp_path)
    assert source.class_names == ("a", "c")
    with pytest.raises(Unreadable, match="No such file"):
        source[2]


def test_zips_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("./a/1.png", png(1))
        archive.writestr("b\\2.png", png(2))
        archive.writestr("__MACOSX/a/1.png", b"no image")
    source = open_source(path)
    assert source.class_names == ("a", "b") and shades(source) == [(1, 0), (2, 1)]
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./a/1.png", png(9))
        archive.writestr("b/c\\3.png", png(3))
    assert shades(open_source(path)) == [(9, 0), (2, 1), (3, 1)]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(png(3))
    except OSError:
        pytest.skip("this file system has names of text alone")
    source = open_source(tmp_path)
    assert shades(source) == [(3, 0)] and source.fingerprint()
    packed = open_source(tar(tmp_path / "t" / "x.tar", {name: png(4), "b.png": png(5)}))
    assert len(packed) == 2 and packed.fingerprint() != source.fingerprint()
