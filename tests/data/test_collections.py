"""Collections as people find them: archives packed by other tools, links, splits, odd names."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erw.data import open_source
from erw.data.images import Unreadable
from erw.data.sources import overview
from erw.data.sources.hub import sets
from erw.errors import DataError


def png(shade: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(held, "PNG")
    return held.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shades(source) -> list[tuple[int, int]]:
    """(shade, label) of every image."""
    return [
        (int(image[0, 0, 0]), label) for image, label in (source[i] for i in range(len(source)))
    ]


def test_the_split_is_told_anywhere_in_a_files_name() -> None:
    found = sets(
        [
            "imagenet1k-train-0000.tar",
            "imagenet1k-validation-00.tar",
            "imagenet-1k-train-00000-of-00002.arrow",
            "data/test-00000-of-00001.parquet",
            "plain.parquet",
            "train/more_val.parquet",
        ]
    )
    assert {split: len(files) for (_, split), files in found.items()} == {
        "train": 3, "validation": 2, "test": 1
    }  # fmt: skip


def test_a_readme_tells_the_sets_of_a_folder(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.png": png(1), "0.cls": b"0"})
    tar(tmp_path / "b.tar", {"0.png": png(2), "0.cls": b"0"})
    header = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: a.tar}\n"
    (tmp_path / "README.md").write_text(f"---\n{header}  - {{split: test, path: b.tar}}\n---\n")
    with pytest.raises(DataError, match="several sets: name one of default/train, default/test"):
        open_source(tmp_path)
    assert shades(open_source(tmp_path, split="test")) == [(2, 0)]


def test_archives_of_equal_name_are_all_read(tmp_path: Path) -> None:
    for part in (1, 2):
        members = {f"{i}.png": png(10 * part + i) for i in range(2)}
        members |= {f"{i}.cls": b"0" for i in range(2)}
        tar(tmp_path / f"p{part}" / "000.tar", members)
    source = open_source(str(tmp_path / "p*" / "*.tar"))
    assert sorted(shade for shade, _ in shades(source)) == [10, 11, 20, 21]
    assert source.where(0).endswith("p1/000.tar!0.png")


def test_several_archives_of_class_folders(tmp_path: Path) -> None:
    for part in (0, 1):
        tar(tmp_path / f"p-{part}.tar", {"cat/1.png": png(part), "dog/1.png": png(10 + part)})
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert sorted(shades(source)) == [(0, 0), (1, 0), (10, 1), (11, 1)]


def test_an_archive_a_class_has_to_be_said(tmp_path: Path) -> None:
    tar(tmp_path / "n01.tar", {"IMG 2020.01.02.png": png(1), "IMG 2020.01.03.png": png(2)})
    tar(tmp_path / "n02.tar", {"x.png": png(3)})
    with pytest.raises(DataError, match="--classes folders to make each archive a class"):
        open_source(tmp_path)
    source = open_source(tmp_path, classes="folders")
    assert source.class_names == ("n01", "n02") and shades(source) == [(1, 0), (2, 0), (3, 1)]
    assert open_source(tmp_path, classes="none").class_names == ()


def test_one_sample_without_its_label_is_an_error(tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(3)} | {"1.cls": b"1", "2.cls": b"0"}
    with pytest.raises(DataError, match="1 of 3 images have no label"):
        open_source(tar(tmp_path / "x.tar", members))


def test_folders_come_before_captions(tmp_path: Path) -> None:
    members = {f"{name}/1{end}": data for name in ("cats", "dogs")
               for end, data in ((".png", png(5)), (".txt", b"0 0.5 0.5"))}  # fmt: skip
    assert open_source(tar(tmp_path / "x.tar", members)).class_names == ("cats", "dogs")
    captions = {"0.png": png(0), "0.txt": b"a picture", "0.json": b'{"caption": "a picture"}'}
    source = open_source(tar(tmp_path / "y.tar", captions))
    assert source.class_names == () and overview(source) == [
        "1 images of y.tar, no classes: the set is unconditional",
        "2 other files are left alone (1 .json, 1 .txt)",
    ]


def test_the_image_of_a_sample_is_the_one_with_a_plain_ending(tmp_path: Path) -> None:
    members = {"0.cls": b"0", "0.depth.png": png(1), "0.png": png(2)}
    assert shades(open_source(tar(tmp_path / "x.tar", members))) == [(2, 0)]
    with pytest.raises(DataError, match="several images"):
        open_source(tar(tmp_path / "y.tar", members | {"0.bmp": png(3)}))


def test_links_in_archives_are_left_alone_and_counted(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a/1.png": png(7), "b/1.png": png(8)})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("b/2.png", tarfile.LNKTYPE), ("b/3.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a/1.png"
            archive.addfile(link)
    source = open_source(path)
    assert shades(source) == [(7, 0), (8, 1)]
    assert "2 links inside archives are left alone" in overview(source)


def test_a_sparse_member_is_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.bmp")
        info.size = 512
        info.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "4096"}
        archive.addfile(info, io.BytesIO(bytes(512)))
    with pytest.raises(DataError, match=r"x\.tar!a\.bmp is stored without its empty blocks"):
        open_source(tmp_path / "x.tar")


def test_a_link_to_nothing_and_an_empty_folder_are_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(1))
    (tmp_path / "c" / "1.png").write_bytes(png(1))
    (tmp_path / "c" / "2.png").symlink_to(tmp_path / "gone.png")
    source = open_source(tmp_path)
    assert source.class_names == ("a", "c")
    assert "1 empty folders are no classes (such as b)" in overview(source)
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
    assert shades(open_source(path)) == [(9, 0), (2, 1)]


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


def test_hidden_files_and_large_endings(tmp_path: Path) -> None:
    (tmp_path / "set" / ".cache").mkdir(parents=True)
    (tmp_path / "set" / ".cache" / "x.parquet").write_bytes(b"")
    (tmp_path / "set" / "._t.tar").write_bytes(b"")
    (tmp_path / "set" / "1.png").write_bytes(png(1))
    assert len(open_source(tmp_path / "set")) == 1
    assert len(open_source(tar(tmp_path / "UP.TAR", {"1.png": png(1)}))) == 1
    np.save(tmp_path / "up.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "up.npy").rename(tmp_path / "UP.NPY")
    assert len(open_source(tmp_path / "UP.NPY")) == 2


def test_two_kinds_of_packed_files(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"1.png": png(1)})
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"holds \.parquet and \.tar files: name one kind"):
        open_source(tmp_path)
