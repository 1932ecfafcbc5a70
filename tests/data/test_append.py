"""Images appended to a cache: rows of their own, classes by name, nothing done twice."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_prepare import start

from erw.data import Cache, growth, open_source
from erw.data.manifest import Manifest
from erw.data.prepare import abandon
from erw.errors import CacheError
from helpers.growing import Parts, add, damage, grown_parts, times
from helpers.parts import ENCODER, files, make, photos, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return grown_parts(tmp_path_factory.mktemp("grow"))


@pytest.fixture
def copy(made: Parts, tmp_path: Path) -> Path:
    """A copy of the cache of the first photos, to be grown."""
    return Path(shutil.copytree(made.root / "first", tmp_path / "copy"))


def test_appended_rows_are_those_of_a_cache_of_their_own(made: Parts, copy: Path) -> None:
    before = files(copy)
    cache = make(made.more, copy, made.vae, encoder=True, append=True)
    first, second = (Cache.open(made.root / name) for name in ("first", "second"))
    after = files(copy)
    assert all(after[name] == data for name, data in before.items() if name.startswith("shards"))
    assert len(cache) == 34 and cache.class_names == ("apple", "bear", "cup", "Zebra")
    assert cache.class_counts == (8, 13, 8, 5)
    a = first.read(range(24), features=[ENCODER])
    b = second.read(range(10), features=[ENCODER])
    got = cache.read(range(34), features=[ENCODER])
    assert torch.equal(got.mean, torch.cat([a.mean, b.mean]))
    assert torch.equal(got.features[0], torch.cat([a.features[0], b.features[0]]))
    # In the second folder Zebra comes first; here it has the first free number.
    assert got.labels.tolist() == [*a.labels.tolist(), *[3] * 5, *[1] * 5]
    assert cache.items(range(34)).tolist() == list(range(34))
    told = json.loads((copy / "manifest.json").read_text())["settings"]
    names = [told["source"]["name"], *(part["name"] for part in told["appended"])]
    assert names == ["set", "more"]
    fingerprint = open_source(made.more).fingerprint()
    assert [part["fingerprint"] for part in told["appended"]] == [fingerprint]
    assert cache.verify() == []


def test_appending_again_only_verifies(made: Parts, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made.root / "grown", tmp_path / "again"))
    before = times(out)
    make(made.more, out, made.vae, encoder=True, append=True)
    make(made.folder, out, made.vae, encoder=True)
    assert times(out) == before
    damage(out / "shards" / "00004.safetensors")
    with pytest.raises(CacheError, match=r"damaged shards 00004\.safetensors"):
        make(made.more, out, made.vae, encoder=True, append=True)
    with pytest.raises(CacheError, match=r"00004.safetensors cannot be made again from set"):
        make(made.folder, out, made.vae, encoder=True, repair=True)
    make(made.more, out, made.vae, encoder=True, repair=True)
    damage(out / "shards" / "00001.safetensors")
    (out / "shards" / "00002.json").unlink()
    make(made.folder, out, made.vae, encoder=True, repair=True)
    assert files(out) == made.grown


def test_a_killed_append_goes_on_and_the_cache_stays_readable(made: Parts, copy: Path) -> None:
    process = start(SimpleNamespace(folder=made.more), copy, vae=made.vae, options={"append": True})
    deadline = time.monotonic() + 300
    while not (copy / "shards" / "00004.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (copy / "shards" / "00005.json").exists(), "it was too fast to be killed"
    assert len(Cache.open(copy)) == 24
    with pytest.raises(CacheError, match=r"still being grown \(by more\).*--abandon"):
        add(made.folder, copy)
    again = Path(shutil.copytree(copy, copy.with_name("abandoned")))
    abandon(again)
    assert files(again) == files(made.root / "first")
    with pytest.raises(CacheError, match="nothing to abandon"):
        abandon(again)
    kept = (copy / "shards" / "00004.safetensors").stat().st_mtime_ns
    make(made.more, copy, made.vae, encoder=True, append=True)
    assert files(copy) == made.grown
    assert (copy / "shards" / "00004.safetensors").stat().st_mtime_ns == kept


def test_any_number_of_ranks_appends_the_same_bytes(made: Parts, copy: Path) -> None:
    how = {"encoder": True, "append": True, "world": 2, "patience": 0.3}
    with pytest.raises(CacheError, match=r"shards \[5\] of other processes"):
        make(made.more, copy, made.vae, rank=0, **how)
    with pytest.raises(CacheError, match=r"shards \[\] of other processes"):  # 0 has to join them
        make(made.more, copy, made.vae, rank=1, **how)
    make(made.more, copy, made.vae, rank=0, **how)
    assert files(copy) == made.grown


def test_what_does_not_fit_is_not_appended(made: Parts, copy: Path, tmp_path: Path) -> None:
    before = files(copy)
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.fromarray(picture(3)).save(bare / "a.png")
    same = photos(tmp_path / "set", each=3)
    how = {"encoder": True, "append": True}
    for source, vae, options, message in (
        (made.more, made.vae, how | {"crop": "resize"}, r"crop \(adm, now resize\); what is app"),
        (made.more, made.vae, how | {"image_size": 64}, r"image_size \(32, now 64\)"),
        (made.more, "none", how, r"vae\.weight_hash"),
        (made.more, made.vae, how | {"encoder": False}, r"encoders\.efficientnet"),
        (made.more, made.vae, how | {"features": "int8"}, r"format \(float16, now int8\)"),
        (made.more, made.vae, how | {"append": False}, "say --append"),
        (bare, made.vae, how, r"has 3 classes and bare none: sort its images"),
        (same, made.vae, how, "has images of another set: if some were put into it since"),
    ):
        with pytest.raises(CacheError, match=message):
            make(source, copy, vae, **options)
        assert files(copy) == before
    with pytest.raises(CacheError, match="to append to"):
        make(made.more, tmp_path / "none", made.vae, append=True)


def test_two_processes_that_append_at_once_take_turns(tmp_path: Path) -> None:
    """One of them grows the cache, the other is told to wait: none is lost, none is mixed in."""
    for name in ("first", "one", "two"):
        photos(tmp_path / name, each=1)
    command = [
        sys.executable,
        "-m",
        "erw",
        "prepare",
        "--out",
        str(tmp_path / "c"),
        "--vae",
        "none",
    ]
    command += ["--encoders", "--image-size", "32"]
    subprocess.run([*command, str(tmp_path / "first")], check=True, capture_output=True)
    both = [
        subprocess.Popen(
            [*command, str(tmp_path / name), "--append"], stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "two")
    ]
    told = [process.communicate()[1] for process in both]
    sources = [source["name"] for source in growth.sources(Manifest.read(tmp_path / "c").settings)]
    done = [
        name for name, process in zip(("one", "two"), both, strict=True) if not process.returncode
    ]
    assert sorted(sources[1:]) == done, told
