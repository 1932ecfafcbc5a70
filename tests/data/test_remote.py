"""Caches at a URL: the rows of the same cache on disk, from files that are downloaded once.

Over HTTP from a real web server on the loopback, and from fsspec's file system in memory.
"""

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erw.cli import main
from erw.data import Cache, Loader
from erw.data.sources import overview
from erw.errors import CacheError
from erw.io import hash_file
from helpers.forked import Python
from helpers.parts import write_checked
from helpers.servers import Web, web
from helpers.tiny import tiny_cache

ENCODER = "efficientnet-lite0"
SHARDS = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """48 rows in 6 shards of 8."""
    return tiny_cache(tmp_path_factory.mktemp("remote") / "cache", rows_per_shard=8)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own folder of downloaded shards."""
    monkeypatch.setenv("ERW_SHARD_CACHE", str(tmp_path / "shards"))
    return tmp_path / "shards"


@pytest.fixture
def site(local: Cache) -> Iterator[Web]:
    with web(local.path) as server:
        yield server


def names(part: str = "") -> list[str]:
    """The files of all shards: the first, or that of encoder 0."""
    return [f"{i:05d}{part}.safetensors" for i in range(SHARDS)]


def downloaded(store: Path) -> list[Path]:
    return list(store.glob("*.safetensors"))


def test_batches_are_those_of_the_cache_on_disk(local: Cache, site: Web, store: Path) -> None:
    remote = Cache.open(site.url)
    assert site.asked == ["manifest.json"]
    assert remote.identity == local.identity and len(remote) == len(local)
    assert site.url in repr(remote)
    one, two = (Loader(c, seed=3, features=[ENCODER]) for c in (local, remote))
    for start in (40, 0, 7):
        a, b = (x.batch(range(start, start + 20)) for x in (one, two))
        assert torch.equal(a.mean, b.mean) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.features[0], b.features[0])
    assert np.array_equal(*(cache.columns(["item"], [5, 47])["item"] for cache in (remote, local)))
    # Every file came once, and is there under its hash for the next process.
    assert sorted(site.asked[1:]) == sorted(names() + names(".0"))
    assert {path.stem for path in downloaded(store)} == {f.blake3 for f in local.manifest.files}
    again = Cache.open(site.url)
    assert torch.equal(again.read([9]).mean, local.read([9]).mean)
    assert again.verify() == []
    assert len(site.asked) == 2 * SHARDS + 2


def test_the_manifest_says_how_many_images_a_class_has(
    local: Cache, site: Web, store: Path, tmp_path: Path
) -> None:
    """No shard is downloaded for it. An older manifest does not say, and labels are not fetched."""
    counts = np.bincount(local.read(range(48)).labels, minlength=9).tolist()
    remote = Cache.open(site.url)
    assert list(local.class_counts() or ()) == list(remote.class_counts() or ()) == counts
    assert overview(remote)[0].endswith("of 5 to 6 images")
    older = Path(shutil.copytree(local.path, tmp_path / "older"))
    told = json.loads((older / "manifest.json").read_text())
    del told["class_counts"]
    write_checked(older, told)
    with web(older) as server:
        unknown = Cache.open(server.url)
        assert unknown.class_counts() is None
        assert overview(unknown)[0].endswith(" ...)") and len(overview(unknown)) == 1
    assert not downloaded(store)
    assert list(Cache.open(older).class_counts() or ()) == counts  # read from its labels
    twice = Cache.open([local.path, older]).class_counts()
    assert list(twice or ()) == [2 * count for count in counts]


def test_features_that_are_not_read_are_not_downloaded(local: Cache, site: Web) -> None:
    loader = Loader(Cache.open(site.url), seed=3)
    assert torch.equal(loader.batch(range(48)).mean, Loader(local, seed=3).batch(range(48)).mean)
    assert sorted(site.asked[1:]) == names()
    Loader(Cache.open(site.url), seed=3, features=[ENCODER]).batch(range(48))
    assert sorted(site.asked[SHARDS + 2 :]) == names(".0")


def test_damaged_downloads_are_thrown_away(site: Web, store: Path) -> None:
    remote = Cache.open(site.url)
    site.damage["00002.safetensors"] = 1
    with pytest.raises(CacheError, match=rf"00002.safetensors arrived damaged from {site.url}"):
        remote.read([17])
    assert not downloaded(store) and not list(store.glob(".*.part"))
    assert remote.read([17]).mean.isfinite().all()
    assert site.asked.count("00002.safetensors") == 2
    site.damage["00005.safetensors"] = 1
    assert remote.verify() == ["00005.safetensors"]
    assert all(hash_file(path) == path.stem for path in downloaded(store))


def test_two_processes_share_a_download_and_a_killed_one_leaves_nothing(
    local: Cache, site: Web, store: Path
) -> None:
    code = "import sys; from erw.data import Cache; print(float(Cache.open(sys.argv[1]).read([3])"
    command = ["-c", f"{code}.mean.sum()))", site.url]
    site.stall["00000.safetensors"] = 1
    first = Python(*command)
    stop = time.monotonic() + 60
    while not list(store.glob(".*.part")) and time.monotonic() < stop:
        time.sleep(0.02)
    second = Python(*command)
    while site.asked.count("manifest.json") < 2 and time.monotonic() < stop:
        time.sleep(0.02)
    time.sleep(0.3)
    assert site.asked.count("00000.safetensors") == 1  # the second one waits for the first
    assert not downloaded(store)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert second.wait(60) == 0 and float(second.out) == float(local.read([3]).mean.sum())
    assert site.asked.count("00000.safetensors") == 2
    assert len(downloaded(store)) == 1 and not list(store.glob(".*.part"))


def test_threads_share_a_download(local: Cache, site: Web) -> None:
    remote, means = Cache.open(site.url), []
    read = [threading.Thread(target=lambda: means.append(remote.read([3]).mean)) for _ in range(4)]
    for thread in read:
        thread.start()
    for thread in read:
        thread.join()
    assert site.asked.count("00000.safetensors") == 1
    assert all(torch.equal(mean, local.read([3]).mean) for mean in means) and len(means) == 4


def test_addresses_that_hold_no_cache(
    site: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url, message in [
        (f"{site.url}/nothing", f"{site.url}/nothing/manifest.json cannot be read"),
        ("http://127.0.0.1:9/cache", "manifest.json cannot be read: check address, network"),
        ("memory://nothing", "manifest.json cannot be read"),
        ("gs://bucket/cache", "gs:// gcsfs"),
        ("foo://bucket/cache", r"cannot be read: .*\(Protocol not known: foo\)"),
    ]:
        with pytest.raises(CacheError, match=message) as error:
            Cache.open(url)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(CacheError, match=r"pip install 'erw\[remote\]'"):
        Cache.open("s3://bucket/cache")
    assert main(["train", "debug", "--data.cache", f"{site.url}/no", "--out", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_goes_on_from_a_url_and_ends_with_the_same_bits(
    local: Cache, store: Path, tmp_path: Path
) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(local.path), "/caches/small", recursive=True)
    url, out = "memory://caches/small", tmp_path / "run"
    command = ["train", "debug", "--model.patch", "8", "--optim.precision", "fp32", "--out"]
    copy = shutil.copytree(local.path, tmp_path / "copy")
    straight = [*command, str(tmp_path / "straight"), "--steps", "8", "--data.cache", str(copy)]
    assert main(straight) == 0
    assert main([*command, str(out), "--steps", "5", "--data.cache", str(copy)]) == 0
    assert main([*command, str(out), "--steps", "8", "--data.cache", url]) == 0
    one, two = (load_file(at / "ema.safetensors") for at in (tmp_path / "straight", out))
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert len(downloaded(store)) == 2 * SHARDS


def test_a_folder_and_a_url_read_as_one(local: Cache, site: Web) -> None:
    both = Cache.open([local.path, site.url])
    rows = [3, 51, 95, 0]
    assert torch.equal(both.read(rows).mean, local.read([3, 3, 47, 0]).mean)
