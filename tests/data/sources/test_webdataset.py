"""Tar archives of class folders, of one class each, and WebDataset shards."""

import io
import tarfile
from pathlib import Path

import pytest

from erw.data import open_source
from erw.data.images import Unreadable
from erw.data.sources import overview
from erw.errors import DataError
from helpers.archives import png, shades, tar


def test_archives_of_equal_name_are_all_read(tmp_path: Path) -> None:
    for part in (1, 2):
        members = {f"{i}.png": png(10 * part + i) for i in range(2)}
        members |= {f"{i}.cls": b"0" for i in range(2)}
        tar(tmp_path / f"p{part}" / "000.tar", members)
    source = open_source(str(tmp_path / "p*" / "*.tar"))
    assert sorted(shade for shade, _ in shades(source)) == [10, 11, 20, 21]
    assert source.location(0).endswith("p1/000.tar!0.png")


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
        f"{tmp_path / 'y.tar'}!0.json names no labels and is left alone: "
        'it has caption, expected "labels"',
        "2 other files are left alone (1 .json, 1 .txt)",
    ]


def test_the_image_of_a_sample_is_the_one_with_a_plain_ending(tmp_path: Path) -> None:
    members = {"0.cls": b"0", "0.depth.png": png(1), "0.png": png(2)}
    assert shades(open_source(tar(tmp_path / "x.tar", members))) == [(2, 0)]


def test_links_in_archives_are_left_alone(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a/1.png": png(7), "b/1.png": png(8)})
    with tarfile.open(path, "a") as archive:
        for name, kind in (("b/2.png", tarfile.LNKTYPE), ("b/3.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a/1.png"
            archive.addfile(link)
    source = open_source(path)
    assert shades(source) == [(7, 0), (8, 1)]


def test_labels_of_a_webdataset(tmp_path: Path) -> None:
    def shard(name: str, **files: bytes) -> Path:
        members = {f"a/0{key[-1]}.{key[:-1]}": value for key, value in files.items()}
        return tar(tmp_path / f"{name}.tar", members)

    image = png(5)
    numbers = open_source(
        shard("json", png0=image, json0=b'{"class_id": 3}', png1=image, json1=b'{"class_id": 1}')
    )
    assert shades(numbers) == [(5, 3), (5, 1)] and len(numbers.class_names) == 4
    named = open_source(
        shard(
            "text",
            png0=image,
            json0=b'{"class_id": "dog"}',
            png1=image,
            json1=b'{"class_id": "cat"}',
        )
    )
    assert named.class_names == ("cat", "dog") and shades(named) == [(5, 1), (5, 0)]
    with pytest.raises(DataError, match="1 of 2 images have no label"):
        open_source(shard("half", png0=image, cls0=b"1", png1=image))
    with pytest.raises(DataError, match="not readable as CLS"):
        open_source(shard("bad", png0=image, cls0=b"dog"))


def test_endings_in_capitals_and_dots_in_names(tmp_path: Path) -> None:
    members = {"0.PNG": png(1), "0.CLS": b"2", "1.PNG": png(2), "1.CLS": b"0"}
    assert shades(open_source(tar(tmp_path / "a.tar", members))) == [(1, 2), (2, 0)]
    members = {"v1.0.png": png(1), "v1.0.cls": b"1", "v1.1.png": png(2), "v1.1.cls": b"0"}
    assert shades(open_source(tar(tmp_path / "b.tar", members))) == [(1, 1), (2, 0)]


def test_archives_that_are_damaged(tmp_path: Path) -> None:
    members = {f"{name}/{i}.png": bytes(1000) for name in ("a", "b") for i in range(4)}
    path = tar(tmp_path / "x.tar", members)
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Unreadable, match="cut short"):
        source[7]
    with pytest.raises(DataError, match=r"not a whole|cut short"):
        open_source(path)
    packed = tar(tmp_path / "packed.tar", {"a.png": b"x"}, mode="w:gz")
    with pytest.raises(DataError, match="uncompress it"):
        open_source(packed)


def test_members_without_their_zeros_are_refused_by_name(tmp_path: Path) -> None:
    """As `tar -S` packs them: a map of the stored pieces, then the pieces."""
    pieces, stored = b"2\n0\n4\n1024\n4\n".ljust(512, b"\0"), b"BM12zero"
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a/0.bmp", "b/1.bmp"):
            info = tarfile.TarInfo(name)
            info.size = len(pieces + stored)
            sparse = {"major": "1", "minor": "0", "name": name, "realsize": "1028"}
            info.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
            archive.addfile(info, io.BytesIO(pieces + stored))
    said = r"x\.tar: a/0\.bmp and 1 others are stored without .*: pack the archive again without -S"
    with pytest.raises(DataError, match=said) as error:
        open_source(path)
    assert "not a whole" not in str(error.value)
