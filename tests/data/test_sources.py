"""Sources: order, labels and names of folders and zips; formats; what is rejected and why."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erw.data.images import Unreadable, decode
from erw.data.sources import FileSource, Source, open_source, where
from erw.data.sources.openmoji import OpenMojiSet
from erw.errors import DataError
from helpers.parts import CLASSES, photos, picture


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    assert where(source, 4) == str(tmp_path / "set" / "bear" / "000.png")


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


@pytest.mark.parametrize("as_dict", [False, True])
def test_edm2_table_of_labels(tmp_path: Path, as_dict: bool) -> None:
    (tmp_path / "00000").mkdir()
    rows = []
    for i in range(4):
        Image.fromarray(picture(i)).save(tmp_path / "00000" / f"img{i:08d}.png")
        rows.append([f"00000/img{i:08d}.png", (3 - i) % 3])
    table = {"labels": dict(rows) if as_dict else rows}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    source = open_source(tmp_path)
    assert labels(source) == [0, 2, 1, 0] and source.class_names == ("0", "1", "2")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_source(tmp_path).class_names == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{", "not readable as JSON"),
        ('{"labels": [["a.png", 1]]}', "no label for b.png"),
        ('{"labels": [["a.png", [0, 1]], ["b.png", 0]]}', "expected a class number"),
        ('{"labels": [["a.png", -1], ["b.png", 0]]}', "expected a class number"),
        ('{"labels": [1, 2]}', "no list of"),
        ('{"labels": {"a.png": 5, "b.png": 0}, "class_names": ["x"]}', "only 1 class names"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, table: str, message: str) -> None:
    for name in "ab":
        Image.fromarray(picture(0)).save(tmp_path / f"{name}.png")
    (tmp_path / "dataset.json").write_text(table)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path)


def test_a_zip_equals_its_folder(tmp_path: Path) -> None:
    folder = open_source(photos(tmp_path / "set", each=3))
    archive = open_source(zipped(tmp_path / "set", tmp_path / "set.zip"))
    assert archive.class_names == folder.class_names and len(archive) == len(folder)
    for i in range(len(folder)):
        assert np.array_equal(archive[i][0], folder[i][0]) and archive[i][1] == folder[i][1]


def test_fingerprints_follow_names_sizes_labels_and_background(tmp_path: Path) -> None:
    folder = photos(tmp_path / "set", each=2)
    first = open_source(folder).fingerprint()
    assert open_source(folder).fingerprint() == first
    assert open_source(folder, background=(0, 0, 0)).fingerprint() != first
    assert open_source(folder, classes="none").fingerprint() != first
    Image.fromarray(picture(50)).save(folder / "cup" / "extra.png")
    assert open_source(folder).fingerprint() != first


def test_missing_empty_and_imageless_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image folder or archive at"):
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
    assert isinstance(source, FileSource) and source.notes == (
        "1 other files are left alone (1 .txt)",
    )


def test_the_built_in_set_by_name() -> None:
    source = open_source("openmoji", count=20, size=32)
    assert isinstance(source, OpenMojiSet) and len(source) == 20
    assert open_source(source) is source


def test_every_mode_becomes_rgb() -> None:
    pixels = picture(3)
    rgb = Image.fromarray(pixels)
    grey = rgb.convert("L")
    assert np.array_equal(decode(save(rgb, "PNG")), pixels)
    assert np.array_equal(decode(save(grey, "PNG"))[..., 1], np.asarray(grey))
    assert np.abs(decode(save(rgb, "WEBP", quality=95)).astype(int) - pixels).mean() < 3
    assert np.array_equal(decode(save(rgb.convert("CMYK"), "TIFF")), pixels)
    palette = rgb.quantize(64)
    assert np.array_equal(decode(save(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bits = np.asarray(grey).astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(save(Image.fromarray(bits), kind))[..., 0], np.asarray(grey))
    assert set(np.unique(decode(save(grey.convert("1"), "PNG")))) == {0, 255}


def tiff(samples: list[int], bits: int, *, photometric: int = 1) -> bytes:
    """A TIFF of one row, of a depth or photometric interpretation that Pillow cannot write."""
    packed = sum(sample << bits * i for i, sample in enumerate(reversed(samples)))
    data = packed.to_bytes(len(samples) * bits // 8, "big")
    if bits == 16:
        data = np.array(samples, "<u2").tobytes()
    tags = {256: len(samples), 257: 1, 258: bits, 259: 1, 262: photometric}
    tags |= {273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: len(data)}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4) + data


def test_deep_grey_keeps_its_range() -> None:
    seen = {
        "12 bits": decode(tiff([0, 0x7FF, 0x800, 0xFFF], 12)),
        "16 bits": decode(tiff([0, 0x7FFF, 0x8000, 0xFFFF], 16)),
        "white is zero": decode(tiff([0xFFFF, 0x8000, 0x7FFF, 0], 16, photometric=0)),
    }
    for most in (4095, 65535):
        samples = np.array([0, most // 2, most // 2 + 1, most], ">u2").tobytes()
        seen[f"PGM to {most}"] = decode(b"P5 4 1 %d\n" % most + samples)
    for what, image in seen.items():
        assert image[0, :, 1].tolist() == [0, 127, 128, 255], what


def test_deep_grey_shows_the_background_where_it_is_transparent() -> None:
    bits = np.array([[1000, 1001, 65535]], np.uint16)
    data = save(Image.fromarray(bits), "PNG", transparency=1000)
    assert decode(data, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [3] * 3, [255] * 3]]


def test_photographs_of_two_lenses(tmp_path: Path) -> None:
    two = [Image.fromarray(picture(i)) for i in (0, 1)]
    two[0].save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=two[1:], quality=95)
    image = open_source(tmp_path)[0][0]
    assert np.abs(image.astype(int) - picture(0)).mean() < 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (80, 80, 80, 255))
    if mode == "P":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([0, 0, 0, 80, 80, 80])
        palette.putpixel((1, 0), 1)
        data = save(palette, "PNG", transparency=0)
    else:
        data = save(image.convert(mode), "PNG")
    assert decode(data).tolist() == [[[255] * 3, [80] * 3]]
    assert decode(data, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [80] * 3]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    pixels = picture(4)
    turned = decode(save(Image.fromarray(pixels), "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(pixels, -1))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, not an image at all", "not an image"),
        (save(Image.fromarray(picture(0)), "JPEG")[:400], "damaged or truncated"),
        (save(Image.fromarray(picture(0)), "PNG")[:900], "damaged or truncated"),
        (bomb(), "more than .* pixels"),
        (save(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "32-bit samples"),
    ],
    ids=["empty", "text", "short-jpeg", "short-png", "bomb", "float"],
)
def test_bad_images_are_rejected_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_file_that_vanished_is_rejected(tmp_path: Path) -> None:
    source = open_source(photos(tmp_path, each=1))
    (tmp_path / "bear" / "000.png").unlink()
    with pytest.raises(Unreadable, match="cannot be read"):
        source[1]
