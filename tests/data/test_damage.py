"""One flipped bit anywhere: in a shard's header, a manifest, an archive, a table, an EXIF block."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from PIL import Image

from erw.cli import main
from erw.data import Cache, open_source
from erw.data.images import Unreadable, decode
from erw.data.prepare import read_spec
from erw.errors import CacheError, DataError
from helpers.hostile import variants
from helpers.parts import ENCODER, make, photos, picture, vae_folder, write_checked


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    root = tmp_path_factory.mktemp("damage")
    return make(photos(root / "set"), root / "made", vae_folder(root / "vae"), encoder=True)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.0.safetensors"])
def test_a_shard_whose_header_lost_a_bit_is_damaged_or_reads_the_same(
    cache: Cache, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    whole = cache.read(range(24), features=[ENCODER])
    path = copy / "shards" / name
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    wrong = 0
    for bit in range(0, 8 * header, 5):
        path.write_bytes(flipped(data, bit))
        try:
            batch = Cache.open(copy).read(range(24), features=[ENCODER])
        except CacheError as error:
            assert name in str(error) and "\n" not in str(error)
            wrong += 1
        else:  # a space, or a name that is not read
            assert torch.equal(batch.features[0], whole.features[0])
            assert torch.equal(batch.mean, whole.mean) and torch.equal(batch.labels, whole.labels)
    assert wrong > 100


def test_a_manifest_that_lost_a_bit_is_damaged(cache: Cache, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    path = copy / "manifest.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 61):
        path.write_bytes(flipped(data, bit))
        try:
            found = Cache.open(copy).manifest
        except CacheError as error:
            assert "manifest.json" in str(error) and "\n" not in str(error)
        else:  # a space
            assert found == cache.manifest


def test_what_a_manifest_says_must_be_what_its_shards_hold(cache: Cache, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    told = json.loads((copy / "manifest.json").read_text())
    for change in (
        {"shards": []}, {"rows": 200}, {"class_counts": [8, 8, 9]}, {"class_counts": [12, 12]},
        {"class_counts": [25, 0, -1]}, {"class_names": ["apple", "bear", "apple"]},
    ):  # fmt: skip
        write_checked(copy, told | change)
        said = r"manifest.json cannot be read: .*(rows, but|two classes of one name)"
        with pytest.raises(CacheError, match=said):
            Cache.open(copy)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """With everything that a cache may hold."""
    root = tmp_path_factory.mktemp("full")
    options: dict[str, Any] = {"flip": True, "images": True, "class_token": True}
    vae = vae_folder(root / "vae")
    return make(photos(root / "set", each=2), root / "made", vae, encoder=True, **options)


def test_a_manifest_that_a_stranger_wrote(full: Cache) -> None:
    """Whatever stands in a field: the same rows are read, or one line names the file."""
    path, refused = full.path / "manifest.json", 0
    told = json.loads(text := path.read_text())
    names = [name for part in full.spec.columns().values() for name in part]
    whole = full.columns(names, range(6))
    try:
        for what, record in variants({k: v for k, v in told.items() if k != "check"}):
            write_checked(full.path, record)
            try:
                again = Cache.open(full.path)
                held = {name for part in again.spec.columns().values() for name in part}
                for name, column in again.columns(sorted(held), range(6)).items():
                    assert torch.equal(column, whole[name]), what
                assert len(again) == 6 and again.read([0]).mean.isfinite().all(), what
            except CacheError as error:
                refused += 1
                assert str(full.path) in str(error) and "\n" not in str(error), what
                assert len(str(error).replace(str(full.path), "")) < 400, what
    finally:
        path.write_text(text)
    assert refused > 350


def test_settings_of_a_cache_that_a_stranger_wrote(full: Cache, tmp_path: Path) -> None:
    told = json.loads((full.path / "prepare.json").read_text())
    wrong = {"encoders.0.format = 'x'", "latent_shape.0 = -1", "image_size = -1", "crop = None"}
    refused = set()
    for what, record in variants(told):
        (tmp_path / "prepare.json").write_text(json.dumps(record))
        try:
            read_spec(tmp_path)
        except CacheError as error:
            refused.add(what)
            assert str(error).startswith(f"{tmp_path / 'prepare.json'} cannot be read"), what
            assert "\n" not in str(error) and len(str(error)) < 400, what
    assert wrong <= refused and len(refused) > 150


def test_a_manifest_gives_back_lost_settings(cache: Cache, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    (copy / "prepare.json").unlink()
    again = make(cache.path.parent / "set", copy, cache.path.parent / "vae", encoder=True)
    assert again.identity == cache.identity


def test_a_cache_older_than_its_counts_is_the_same_when_it_is_mended(
    cache: Cache, tmp_path: Path
) -> None:
    """Runs that were begun on it go on."""
    copy = Path(shutil.copytree(cache.path, tmp_path / "copy"))
    told = json.loads((copy / "manifest.json").read_text())
    assert told.pop("class_counts") == [8, 8, 8]
    del told["check"]
    told["check"] = blake3(json.dumps(told, sort_keys=True).encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(told, sort_keys=True, indent=1) + "\n")
    before = Cache.open(copy)
    (copy / "shards" / "00001.safetensors").unlink()
    again = make(cache.path.parent / "set", copy, cache.path.parent / "vae", encoder=True)
    assert again.verify() == [] and again.identity == before.identity
    assert again.class_counts() == (8, 8, 8)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_bit_of_an_archive_costs_one_image(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", kind) as archive:
        for i in range(3):
            file = io.BytesIO()
            Image.fromarray(picture(i)).save(file, "BMP")
            archive.writestr(f"{i}.bmp", file.getvalue())
        info = archive.getinfo("1.bmp")
        begin = info.header_offset + 30 + len("1.bmp")
    data, wrong = path.read_bytes(), 0
    for byte in range(begin, begin + info.compress_size, info.compress_size // 40):
        path.write_bytes(flipped(data, 8 * byte))
        source = open_source(path)
        assert source[0][0].shape == source[2][0].shape == (40, 52, 3)
        try:  # the last bits of a stream mean nothing
            assert np.array_equal(source[1][0], picture(1))
        except Unreadable:
            wrong += 1
    assert wrong >= 40


def test_a_page_of_a_table_costs_its_images_alone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    rows = []
    for i in range(4):
        file = io.BytesIO()
        Image.fromarray(picture(i)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": f"{i}.png"})
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"image": rows, "label": [0, 1, 0, 1]})
    parquet.write_table(table, path, row_group_size=2, compression="zstd")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x28\xb5\x2f\xfd") + 2  # the first compressed page
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(Unreadable, match="damaged inside the table"):
        source[0]
    assert np.array_equal(source[3][0], picture(3))


def test_files_of_a_table_that_differ_are_told_in_one_line(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    columns = {"image": [b"x"], "label": [0]}
    for i in range(2):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{i}.parquet")
        columns.pop("label", None)
    with pytest.raises(DataError, match=r"1.parquet has .*None.*0.parquet .*'label'"):
        open_source(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_odd_exif_block_does_not_cost_the_photograph() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    file = io.BytesIO()
    Image.fromarray(picture(0)).save(file, "JPEG", quality=95, exif=exif)
    data, plain = file.getvalue(), decode(file.getvalue())
    assert plain.shape == (52, 40, 3), "turned"
    start, turned = data.index(b"Exif\0\0") + 6, 0
    for byte in range(start, start + 90):
        found = decode(flipped(data, 8 * byte + 1))
        assert found.shape in ((52, 40, 3), (40, 52, 3))
        turned += found.shape == plain.shape
    assert turned > 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(picture(0)).save(file, "PNG", exif=exif)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(file.getvalue()), upright)


def test_files_that_are_left_alone_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "set", each=1)
    for i in range(2):
        (folder / "apple" / f"IMG_{i}.HEIC").write_bytes(b"heic")
    args = ["prepare", str(folder), "--out", str(tmp_path / "out"), "--vae", "none"]
    args += ["--encoders", "--image-size", "32"]
    assert main([*args, "--dry-run"]) == 0
    assert "2 other files are left alone (2 .heic)" in capsys.readouterr().out
    assert main(args) == 0
    assert "2 other files are left alone (2 .heic)" in capsys.readouterr().err


def test_images_of_no_use_leave_the_folder_to_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    good, out = photos(tmp_path / "good", each=1), str(tmp_path / "out")
    how = ["--out", out, "--vae", "none", "--encoders", "--image-size", "32"]
    assert main(["prepare", str(tmp_path / "bad"), *how]) == 2
    assert "none of the 1 images" in capsys.readouterr().err
    assert [path.name for path in Path(out).iterdir()] == ["rejected.jsonl"]
    assert main(["prepare", str(good), *how]) == 0
    assert len(Cache.open(out)) == 3
    capsys.readouterr()
    assert main(["prepare", str(good), *how, "--classes", "none"]) == 2
    said = capsys.readouterr().err
    assert "--classes" in said and "--data.cache A B" in said


def test_an_online_folder_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photos(tmp_path / "set", each=1), str(tmp_path / "out")
    args = ["prepare", str(folder), "--out", out, "--online", "--vae", "none", "--encoders"]
    assert main([*args, "--image-size", "32"]) == 0
    assert main(["prepare", "--out", out, "--verify"]) == 0
