"""Preparing: a stop changes nothing, nor does the number of ranks; the rest is said clearly."""

import dataclasses
import errno
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from erw.data import Cache, open_source
from erw.data.prepare import prepare, verify
from erw.encoders import load_encoder, load_vae
from erw.errors import CacheError, ConfigError, DataError
from erw.io import lock
from helpers.forked import Python, ranks
from helpers.parts import ENCODER, files, make, photos, vae_folder

# A source slow enough to be caught in the middle, everything else as in `make`.
SLOW = """
import json, sys, time
from pathlib import Path
from helpers.parts import make
from erw.data.sources.files import folder as files_below
from erw.data.sources import FileSource

class Slow(FileSource):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)

folder, out, vae, options = sys.argv[1:]
make(Slow(files_below(Path(folder))), Path(out), vae, encoder=True, **json.loads(options))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("prepare")
    vae, folder = vae_folder(root / "vae"), photos(root / "set")
    make(folder, root / "whole", vae)
    make(folder, root / "features", "none", encoder=True)
    whole, features = files(root / "whole"), files(root / "features")
    return SimpleNamespace(vae=vae, folder=folder, whole=whole, features=features)


def start(made: SimpleNamespace, out: Path, env: dict[str, str] | None = None) -> Python:
    """Another process that prepares the folder slowly, with these environment variables."""
    return Python("-c", SLOW, made.folder, out, "none", "{}", env=env)


def test_kill_9_and_the_same_command_again(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(made, out)
    deadline = time.monotonic() + 300
    while not (out / "shards" / "00001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists(), "it was too fast to be killed"
    kept = (out / "shards" / "00000.safetensors").stat().st_mtime_ns
    (out / "shards" / ".00003.safetensors.123.part").write_bytes(b"half a shard")
    (out / "shards" / "00002.safetensors").write_bytes(b"a shard without its record")
    make(made.folder, out, "none", encoder=True)
    assert files(out) == made.features
    assert (out / "shards" / "00000.safetensors").stat().st_mtime_ns == kept


def test_ranks_join_to_the_same_bytes(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "ranks"
    begun = [start(made, out, env) for env in ranks(2)]
    assert [rank.wait() for rank in begun] == [0, 0], [rank.err for rank in begun]
    assert files(out) == made.features


def test_one_process_at_a_time(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "used"
    with (
        lock(out / "shards" / ".lock"),
        pytest.raises(CacheError, match=r"another process is preparing .*used: wait"),
    ):
        make(made.folder, out, made.vae)
    make(made.folder, out, made.vae)
    assert files(out) == made.whole


def test_weights_of_the_hub_are_told_with_their_commit(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    encoder, vae = load_encoder(ENCODER), load_vae(made.vae)
    encoder.revision = "a" * 40
    named = dataclasses.replace(vae, revision="b" * 40)
    out = tmp_path / "out"
    how = {"image_size": 32, "progress": False}
    prepare(made.folder, out, vae=named, encoders=[encoder], **how)
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    told = settings["vae"]["revision"], settings["encoders"][0]["revision"]
    assert told == ("b" * 40, "a" * 40)
    prepare(made.folder, out, vae=vae, encoders=[load_encoder(ENCODER)], **how)  # from a file


def test_running_again_only_verifies(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "again"
    make(made.folder, out, made.vae)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make(made.folder, out, made.vae)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_damage_is_named_by_verify_and_made_again_by_the_same_command(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "damaged"
    make(made.folder, out, made.vae)
    path = out / "shards" / "00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"damaged shards 00002\.safetensors.*erw prepare"):
        verify(out)
    make(made.folder, out, made.vae)
    assert files(out) == made.whole and len(verify(out)) == 24
    path.unlink()
    (out / "shards" / "00001.json").unlink()
    make(made.folder, out, made.vae)
    assert files(out) == made.whole


def test_other_settings_are_named(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "settings"
    make(made.folder, out, made.vae)
    with pytest.raises(CacheError, match=r"other settings: flip \(False, now True\)"):
        make(made.folder, out, made.vae, flip=True)
    with pytest.raises(CacheError, match=r"encoders\.efficientnet.*\.dim \(None, now 112\)"):
        make(made.folder, out, made.vae, encoder=True)
    other = vae_folder(tmp_path / "vae")
    make(made.folder, out, other)  # equal weights elsewhere are the same VAE
    photos(tmp_path / "more", each=9)
    with pytest.raises(CacheError, match=r"source\.count \(24, now 27\)"):
        make(tmp_path / "more", out, made.vae)


def test_a_folder_with_other_things_is_left_alone(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CacheError, match="is no cache and not empty"):
        make(made.folder, tmp_path, made.vae)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30}, "no multiple of 4"),
        ({"features": "int3"}, "unknown features 'int3'"),
        ({"precision": "half"}, "unknown precision"),
        ({"rows_per_shard": 0}, "rows_per_shard"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_settings(
    made: SimpleNamespace, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(made.folder, tmp_path / "out", made.vae, **options)
    assert not (tmp_path / "out").exists()


def spoil(folder: Path) -> None:
    (folder / "apple" / "000.png").write_bytes(b"")
    (folder / "bear" / "003.jpg").write_bytes(b"not an image")
    short = folder / "cup" / "007.jpg"
    short.write_bytes(short.read_bytes()[:200])


def test_rejects_are_listed_and_skipped(made: SimpleNamespace, tmp_path: Path) -> None:
    spoil(photos(tmp_path / "set"))
    cache = make(tmp_path / "set", tmp_path / "out", made.vae)
    assert len(cache) == 21 and cache.manifest.rejected == 3
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["item"] for row in rows] == [0, 11, 23]
    assert rows[0]["path"].endswith("apple/000.png") and rows[0]["reason"] == "empty file"
    assert "not an image" in rows[1]["reason"] and "runcated" in rows[2]["reason"]
    kept = [i for i in range(24) if i not in (0, 11, 23)]
    assert cache.columns(["item"], range(21))["item"].tolist() == kept
    expected = [open_source(tmp_path / "set")[i][1] for i in kept]
    assert cache.read(range(21)).labels.tolist() == expected


def test_a_shard_of_nothing_but_rejects(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = photos(tmp_path / "set")
    for path in sorted((folder / "apple").iterdir()):
        path.write_bytes(b"")
    cache = make(folder, tmp_path / "out", made.vae)
    assert len(cache) == 16 and sorted(
        set(cache.columns(["label"], range(16))["label"].tolist())
    ) == [1, 2]
    assert len(Cache.open(tmp_path / "out").read(range(16)).labels) == 16


def test_nothing_usable_at_all(made: SimpleNamespace, tmp_path: Path) -> None:
    for path in photos(tmp_path / "set", each=1).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 3 images .* can be used: .*empty file"):
        make(tmp_path / "set", tmp_path / "out", made.vae)


def test_labels_out_of_range_stop_it(made: SimpleNamespace, tmp_path: Path) -> None:
    source = open_source(made.folder)
    source.class_names = ("apple", "bear")
    with pytest.raises(DataError, match="has label 2, but there are 2 classes"):
        make(source, tmp_path / "out", made.vae)


def test_a_full_disk_leaves_a_cache_that_goes_on(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sync, calls = tmp_path / "full", os.fsync, 0

    def fail(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        CacheError, match=r"could not make shard .*No space left.*run the same command"
    ):
        make(made.folder, out, made.vae)
    monkeypatch.undo()
    assert not list(out.rglob("*.part"))
    make(made.folder, out, made.vae)
    assert files(out) == made.whole


def test_pixels_instead_of_latents(made: SimpleNamespace, tmp_path: Path) -> None:
    cache = make(made.folder, tmp_path / "pixels", "none", images=True, image_size=20)
    batch = cache.read([4])
    assert cache.latent_shape == (3, 20, 20) and not batch.std.any()
    assert ((batch.mean + 1) * 127.5 - cache.images([4])).abs().max() < 0.1


def test_what_was_made_is_reported(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(made.folder, out, made.vae, encoder=True, features="int8", progress=True)
    size = sum(p.stat().st_size for p in out.rglob("*.safetensors"))
    report = capsys.readouterr().err
    assert f"{size / 1e6:.1f} MB, {size / 24:.0f} bytes a row" in report


def test_low_precision_stays_close_and_is_noted(made: SimpleNamespace, tmp_path: Path) -> None:
    full = make(made.folder, tmp_path / "full", made.vae, encoder=True)
    low = make(made.folder, tmp_path / "low", made.vae, encoder=True, precision="bfloat16")
    a, b = (cache.read(range(24), features=[ENCODER]) for cache in (full, low))
    assert not torch.equal(a.mean, b.mean)
    assert torch.nn.functional.cosine_similarity(a.features[0], b.features[0], -1).mean() > 0.999
    with pytest.raises(CacheError, match=r"precision \(bfloat16, now float32\)"):
        make(made.folder, tmp_path / "low", made.vae, encoder=True)


def test_neither_threads_nor_cores_show_in_the_bytes(tmp_path: Path) -> None:
    folder, before = photos(tmp_path / "set"), torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            make(folder, tmp_path / str(threads), vae_folder(tmp_path / "vae"), encoder=True)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "1") == files(tmp_path / "3")
