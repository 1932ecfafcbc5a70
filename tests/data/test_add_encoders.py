"""Encoders added to a cache: as if they had always been there, of images that are the same."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from erw.cli import main
from erw.data import Cache, writer
from erw.data.prepare import add_encoders, prepare, verify
from erw.encoders import load_encoder, load_vae
from erw.errors import CacheError
from helpers.parts import ENCODER, TwoCaches, files, make, photos, two_caches

OTHER = "efficientnet-lite2@64"


def add(source: Path, out: Path, *names: str, **options: object) -> Cache:
    """`add_encoders`, of `OTHER` if none is named, in the batches of `make`."""
    names = names or (OTHER,)
    return add_encoders(source, out, encoders=names, batch_size=4, progress=False, **options)


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def times(out: Path) -> dict[str, int]:
    """When each file of a cache was written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TwoCaches:
    return two_caches(tmp_path_factory.mktemp("grow"))


@pytest.fixture
def copy(made: TwoCaches, tmp_path: Path) -> Path:
    """A copy of the cache of the first photos, to be grown."""
    return Path(shutil.copytree(made.root / "first", tmp_path / "copy"))


def test_an_added_encoder_is_as_if_it_had_always_been_there(
    made: TwoCaches, tmp_path: Path
) -> None:
    folder = photos(tmp_path / "set", each=4)  # bfloat16 is slow where it is not native
    (folder / "bear" / "003.jpg").write_bytes(b"no image")
    both = [load_encoder(ENCODER), load_encoder(OTHER)]
    how = {"flip": True, "images": True, "precision": "bfloat16"}
    at_once = make(folder, tmp_path / "both", made.vae, encoders=both, **how)
    out = tmp_path / "one"
    make(folder, out, made.vae, encoder=True, **how)
    before = files(out)
    cache = add(folder, out)
    kept = {name: data for name, data in before.items() if name.endswith(".safetensors")}
    assert kept.items() <= files(out).items()
    assert files(out) == files(tmp_path / "both")
    sides = np.arange(11) % 2 == 0
    wanted = at_once.read(range(11), features=[ENCODER, OTHER], flipped=sides)
    got = cache.read(range(11), features=[ENCODER, OTHER], flipped=sides)
    assert all(map(torch.equal, got.features, wanted.features))
    assert torch.equal(got.mean, wanted.mean) and torch.equal(got.labels, wanted.labels)
    assert cache.features == at_once.features


def test_adding_again_verifies_and_the_first_command_mends(made: TwoCaches, copy: Path) -> None:
    cache = add(made.folder, copy)
    whole, before = files(copy), times(copy)
    assert set(cache.features) == {ENCODER, OTHER}
    add(made.folder, copy)
    make(made.folder, copy, made.vae, encoder=True)  # the command that it was made with
    assert times(copy) == before
    damage(copy / "shards" / "00002.1.safetensors")
    damage(copy / "shards" / "00001.safetensors")
    assert Cache.open(copy).verify() == ["00001.safetensors", "00002.1.safetensors"]
    with pytest.raises(
        CacheError, match=r"shard 1 is damaged or unfinished: make it again with the erw prep"
    ):
        add(made.folder, copy)
    both = [load_encoder(ENCODER), load_encoder(OTHER)]
    make(made.folder, copy, made.vae, encoders=both)
    assert files(copy) == whole
    damage(copy / "shards" / "00002.1.safetensors")
    add(made.folder, copy)
    assert files(copy) == whole


def test_a_stopped_addition_leaves_the_cache_readable_and_goes_on(
    made: TwoCaches, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = writer.write_columns, []

    def stop(path: Path, columns: dict[str, torch.Tensor]) -> object:
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(path, columns)

    monkeypatch.setattr(writer, "write_columns", stop)
    with pytest.raises(KeyboardInterrupt):
        add(made.folder, copy)
    assert set(Cache.open(copy).features) == {ENCODER}
    add(made.folder, copy)
    assert calls == [f"0000{i}.1.safetensors" for i in (0, 1, 2, 2, 3)]
    assert files(copy) == files(add(made.folder, copy).path)


def test_images_that_are_not_those_of_the_cache(
    made: TwoCaches, copy: Path, tmp_path: Path
) -> None:
    before = files(copy)
    with pytest.raises(CacheError, match=r"other settings: source\.count \(24, now 10\)"):
        add(made.more, copy)
    with pytest.raises(
        CacheError, match=r"begun with other settings: enc.*format \(float16, now int8"
    ):
        add(made.folder, copy, ENCODER, features="int8")
    with pytest.raises(CacheError, match="no cache at"):
        add(made.folder, tmp_path / "nothing")
    assert files(copy) == before
    folder = Path(shutil.copytree(made.folder, tmp_path / "set"))
    path = folder / "cup" / "006.png"
    path.write_bytes(b"\0" * path.stat().st_size)  # the name and the size are as they were
    with pytest.raises(CacheError, match=r"cup/006\.png has changed since its row was stored"):
        add(folder, copy)


def test_an_encoder_is_added_where_all_images_of_a_shard_were_rejected(tmp_path: Path) -> None:
    folder = photos(tmp_path / "set", each=2)
    for i in range(4):  # the first shard
        (folder / "a").mkdir(exist_ok=True)
        (folder / "a" / f"{i}.png").write_bytes(b"xx")
    out = tmp_path / "c"
    cache = prepare(
        folder, out, vae=load_vae("none"), image_size=32, rows_per_shard=4, progress=False
    )
    rows = len(cache)
    grown = add_encoders(
        folder, out, encoders=[load_encoder("efficientnet-lite0@32")], progress=False
    )
    assert len(grown) == rows
    features = grown.read(range(rows), features=["efficientnet-lite0@32"]).features[0]
    assert features.isfinite().all() and verify(out)


def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_on_the_command_line(
    made: TwoCaches, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that are not given are those of the cache."""
    erw = run(capsys)
    assert erw("prepare", made.folder, "--out", copy)[0] == 0
    code, _, err = erw("prepare", made.more, "--out", copy)
    assert code == 2 and "--data.cache A B reads both as one" in err
    code, _, err = erw("prepare", made.folder, "--out", copy, "--add-encoder", OTHER, "--flip")
    assert code == 2 and "--add-encoder takes --features, --class-token" in err
    code, out, _ = erw("prepare", made.folder, "--out", copy, "--add-encoder", OTHER)
    assert code == 0 and OTHER in out
    assert erw("prepare", "--out", copy, "--verify")[0] == 0
    damage(copy / "shards" / "00003.1.safetensors")
    code, _, err = erw("prepare", "--out", copy, "--verify")
    assert code == 2 and "00003.1.safetensors" in err
    assert erw("prepare", made.folder, "--out", copy)[0] == 0
    assert erw("prepare", "--out", copy, "--verify")[0] == 0
    code, _, err = erw("prepare", "--out", copy, "--add-encoder", "efficientnet-lite0@32")
    assert code == 2 and "missing IMAGES" in err
    assert erw("prepare", "--out", copy)[0] == 2
    code, _, err = erw("prepare", made.more, "--out", "s3://bucket/cache")
    assert code == 2 and "made in a local folder, not at s3://bucket/cache" in err
