"""Growing a cache: images appended, encoders added, components of features; nothing done twice."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from erw.cli import main
from erw.data import Cache, growth, open_source
from erw.data.manifest import Manifest
from erw.data.pca import components, numbers
from erw.data.prepare import abandon, add_encoders, prepare, verify
from erw.encoders import load_encoder, load_vae
from erw.errors import CacheError, ConfigError
from parts import ENCODER, files, make, photos, picture, vae_folder
from test_prepare import start

OTHER = "efficientnet-lite2@64"
Parts = SimpleNamespace


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """24 photos of three classes, 10 more of one of them and of a new one, a cache of the first."""
    root = tmp_path_factory.mktemp("grow")
    vae, folder, more = vae_folder(root / "vae"), photos(root / "set"), root / "more"
    for label, name in enumerate(("bear", "Zebra")):
        (more / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(picture(100 + label * 5 + i)).save(more / name / f"{i}.png")
    make(folder, root / "first", vae, encoder=True)
    make(more, root / "second", vae, encoder=True)
    grown = shutil.copytree(root / "first", root / "grown")
    make(more, grown, vae, encoder=True, append=True)
    return Parts(root=root, vae=vae, folder=folder, more=more, grown=files(grown))


@pytest.fixture
def copy(made: Parts, tmp_path: Path) -> Path:
    """A copy of the cache of the first photos, to be grown."""
    return Path(shutil.copytree(made.root / "first", tmp_path / "copy"))


def add(source: Path | None, out: Path, *names: str, **options: object) -> Cache:
    names = names or (OTHER,)
    return add_encoders(source, out, encoders=names, batch_size=4, progress=False, **options)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def times(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


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


def test_an_added_encoder_is_as_if_it_had_always_been_there(made: Parts, tmp_path: Path) -> None:
    folder = photos(tmp_path / "set")
    (folder / "bear" / "003.jpg").write_bytes(b"no image")
    both = [load_encoder(ENCODER), load_encoder(OTHER)]
    how = {"flip": True, "images": True, "crop": "random", "precision": "bfloat16"}
    at_once = make(folder, tmp_path / "both", made.vae, encoders=both, **how)
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        make(folder, out, made.vae, encoder=True, **how)
    before = files(outs[0])
    caches = [add(folder, outs[0]), add(None, outs[1])]  # the images again, or those of the rows
    assert files(outs[0]) == files(outs[1])
    kept = {name: data for name, data in before.items() if name.startswith("shards")}
    assert kept.items() <= files(outs[0]).items()
    for name, data in files(tmp_path / "both").items():
        assert not name.endswith(".safetensors") or files(outs[0])[name] == data
    sides = np.arange(23) % 2 == 0
    wanted = at_once.read(range(23), features=[ENCODER, OTHER], flipped=sides)
    for cache in caches:
        got = cache.read(range(23), features=[ENCODER, OTHER], flipped=sides)
        assert all(map(torch.equal, got.features, wanted.features))
        assert torch.equal(got.mean, wanted.mean) and torch.equal(got.labels, wanted.labels)
        assert cache.manifest.fidelity == at_once.manifest.fidelity
        assert cache.features == at_once.features


def test_adding_again_goes_on_or_verifies_and_is_repaired(made: Parts, copy: Path) -> None:
    how = {"world": 2, "patience": 0.3}
    with pytest.raises(CacheError, match=r"shards \[1, 3\] of other processes"):
        add(made.folder, copy, rank=0, **how)
    assert set(Cache.open(copy).features) == {ENCODER}
    again = Path(shutil.copytree(copy, copy.with_name("abandoned")))
    assert main(["prepare", "--out", str(again), "--abandon"]) == 0
    assert files(again) == files(made.root / "first")
    cache = add(made.folder, copy)
    whole, before = files(copy), times(copy)
    assert set(cache.features) == {ENCODER, OTHER}
    add(made.folder, copy)
    make(made.folder, copy, made.vae, encoder=True)  # the command that it was made with
    assert times(copy) == before
    damage(copy / "shards" / "00002.1.safetensors")
    damage(copy / "shards" / "00001.safetensors")
    assert Cache.open(copy).verify() == ["00001.safetensors", "00002.1.safetensors"]
    with pytest.raises(CacheError, match=r"00002\.1\.safetensors.*--repair"):
        add(made.folder, copy)
    both = [load_encoder(ENCODER), load_encoder(OTHER)]
    make(made.folder, copy, made.vae, encoders=both, repair=True)
    assert files(copy) == whole


def test_images_that_are_not_those_of_the_cache(made: Parts, copy: Path, tmp_path: Path) -> None:
    before = files(copy)
    with pytest.raises(CacheError, match=r"more \(10 images\) is not what the cache was made of"):
        add(made.more, copy)
    with pytest.raises(CacheError, match=r"holds no images: give those .* \(set\) again"):
        add(None, copy)
    with pytest.raises(CacheError, match=r"features of effic.*already, with another format"):
        add(made.folder, copy, ENCODER, features="int8")
    with pytest.raises(CacheError, match="no cache at"):
        add(made.folder, tmp_path / "nothing")
    assert files(copy) == before
    folder = Path(shutil.copytree(made.folder, tmp_path / "set"))
    path = folder / "cup" / "006.png"
    path.write_bytes(b"\0" * path.stat().st_size)  # the name and the size are as they were
    with pytest.raises(CacheError, match=r"cup/006\.png has changed since its row was stored"):
        add(folder, copy)


def test_images_appended_and_encoders_added_in_turn(made: Parts, tmp_path: Path) -> None:
    """An encoder comes to two sources one after the other; what is appended then has both."""
    out = Path(shutil.copytree(made.root / "grown", tmp_path / "grown"))
    cache = add(made.folder, out, features="int8")
    assert set(cache.features) == {ENCODER}  # those of the second source are still missing
    cache = add(made.more, out, features="int8")
    assert cache.features[OTHER].format == "int8"
    third = tmp_path / "third" / "cup"
    third.mkdir(parents=True)
    Image.fromarray(picture(9)).save(third / "a.png")
    both = [load_encoder(ENCODER), load_encoder(OTHER)]
    cache = make(third.parent, out, made.vae, encoders=both, append=True)
    assert len(cache) == 35 and cache.read([34]).labels.tolist() == [2]
    names = {path.name for path in (out / "shards").glob("0000[56]*.safetensors")}
    assert names == {
        f"{shard}{i}.safetensors" for shard in ("00005", "00006") for i in ("", ".0", ".1")
    }
    alone = make(third.parent, tmp_path / "alone", made.vae, encoders=both)
    wanted = alone.read([0], features=[ENCODER, OTHER]).features
    got = cache.read([34], features=[ENCODER, OTHER]).features
    assert torch.equal(got[0], wanted[0])
    assert torch.nn.functional.cosine_similarity(got[1], wanted[1], dim=-1).min() > 0.999


@pytest.fixture(scope="module")
def reduced(made: Parts) -> Cache:
    return make(made.folder, made.root / "pca", made.vae, encoder=True, pca=16, features="bfloat16")


def test_components_are_those_of_the_features(made: Parts, reduced: Cache) -> None:
    full = Cache.open(made.root / "first").read(range(24), features=[ENCODER]).features[0]
    told = reduced.manifest.pca[ENCODER]
    pca = components(reduced, ENCODER)
    flat = full.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    values = torch.linalg.svdvals(centred).square()
    assert told["variance"] == pytest.approx(float(values[:16].sum() / values.sum()), rel=1e-3)
    assert told["images"] == 24 and 0.5 < told["variance"] < 1
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(16))
    spec = reduced.features[ENCODER]
    assert (spec.dim, spec.tokens, spec.format) == (16, 16, "bfloat16")
    got = reduced.read(range(24), features=[ENCODER]).features[0]
    torch.testing.assert_close(got, pca.reduce(full), atol=0.05, rtol=0.02)
    left = (pca.expand(pca.reduce(full)) - full).square().sum() / centred.square().sum()
    assert float(left) == pytest.approx(1 - told["variance"], rel=0.02)
    with pytest.raises(CacheError, match="holds no components for"):
        components(Cache.open(made.root / "first"), ENCODER)
    report = json.loads((reduced.path / "report.json").read_text())
    assert report["pca"][ENCODER]["of"] == 112


def test_the_fit_is_spread_over_the_source() -> None:
    assert numbers(5) == [0, 1, 2, 3, 4]
    many = numbers(1_281_167)
    assert len(many) == 2048 and many[0] == 0 and many[-1] > 1_280_000
    assert {b - a for a, b in pairwise(many)} <= {625, 626}


@pytest.mark.parametrize("kind", ["float16", "int8", "float8"])
def test_reduced_features_in_every_format(
    made: Parts, reduced: Cache, tmp_path: Path, kind: str
) -> None:
    cache = make(made.folder, tmp_path / kind, made.vae, encoder=True, pca=16, features=kind)
    a, b = (c.read(range(24), features=[ENCODER]).features[0] for c in (cache, reduced))
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.999
    assert cache.manifest.pca == reduced.manifest.pca


def test_growing_keeps_the_components(made: Parts, reduced: Cache, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reduced.path, tmp_path / "pca"))
    part = out / "shards" / "pca.0.safetensors"
    first = part.read_bytes()
    cache = make(made.more, out, made.vae, encoder=True, append=True)
    assert cache.features[ENCODER].dim == 16 and part.read_bytes() == first
    with pytest.raises(CacheError, match=r"pca\.kept \(16, now 8\)"):
        make(made.folder, out, made.vae, encoder=True, pca=8)
    add(made.folder, out, pca=8)
    cache = add(made.more, out, pca=8)
    assert [cache.features[name].dim for name in (ENCODER, OTHER)] == [16, 8]
    whole = files(out)
    damage(part)
    assert cache.verify() == ["pca.0.safetensors"]
    both = [load_encoder(ENCODER), load_encoder(OTHER)]
    make(made.folder, out, made.vae, encoders=both, repair=True)
    assert files(out) == whole


def test_a_grown_cache_at_a_url(
    made: Parts, reduced: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERW_SHARD_CACHE", str(tmp_path / "store"))
    out = Path(shutil.copytree(reduced.path, tmp_path / "pca"))
    near = add(made.folder, out)
    far = Cache.open(f"file://{out}")
    names = [ENCODER, OTHER]
    a, b = (cache.read([3, 20], features=names).features for cache in (near, far))
    assert all(map(torch.equal, a, b)) and far.verify() == []
    assert torch.equal(components(far, ENCODER).mean, components(near, ENCODER).mean)


def test_impossible_numbers_of_components(made: Parts, tmp_path: Path) -> None:
    for kept in (0, 112):
        with pytest.raises(ConfigError, match=rf"pca is {kept}: expected 1 to 111"):
            make(made.folder, tmp_path / "x", made.vae, encoder=True, pca=kept)
    assert not (tmp_path / "x").exists()


def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_on_the_command_line(made: Parts, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that are not given are those of the cache."""
    erw = run(capsys)
    assert erw("prepare", made.folder, "--out", copy)[0] == 0
    code, out, _ = erw("prepare", made.more, "--out", copy, "--append")
    assert code == 0 and "34 rows" in out
    code, _, err = erw("prepare", made.more, "--out", copy, "--add-encoder", OTHER, "--crop", "adm")
    assert code == 2 and "--crop does not go with --add-encoder" in err
    assert erw("prepare", made.folder, "--out", copy, "--add-encoder", OTHER)[0] == 0
    code, out, _ = erw("prepare", made.more, "--out", copy, "--add-encoder", OTHER)
    assert code == 0 and OTHER in out
    assert erw("prepare", "--out", copy, "--verify")[0] == 0
    damage(copy / "shards" / "00005.1.safetensors")
    code, _, err = erw("prepare", "--out", copy, "--verify")
    assert code == 2 and "00005.1.safetensors" in err
    assert erw("prepare", made.more, "--out", copy, "--repair")[0] == 0
    code, _, err = erw("prepare", "--out", copy, "--add-encoder", "efficientnet-lite0@32")
    assert code == 2 and "holds no images" in err
    assert erw("prepare", "--out", copy, "--append")[0] == 2
    code, _, err = erw("prepare", made.more, "--out", "s3://bucket/cache")
    assert code == 2 and "made in a local folder, not at s3://bucket/cache" in err


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
        folder, out, encoders=[load_encoder("efficientnet-lite0@32")], progress=False, patience=5
    )
    assert len(grown) == rows
    features = grown.read(range(rows), features=["efficientnet-lite0@32"]).features[0]
    assert features.isfinite().all() and verify(out)


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


def test_images_that_changed_at_equal_size_are_not_mixed_in(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / "set" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(tmp_path / "set" / "a" / f"{i}.bmp")
    folder, out = tmp_path / "set", tmp_path / "c"
    prepare(folder, out, vae=load_vae("none"), image_size=32, progress=False)
    one, two = (folder / "a" / f"{i}.bmp" for i in (1, 2))
    data = one.read_bytes()
    assert len(data) == two.stat().st_size
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    encoder = [load_encoder("efficientnet-lite0@32")]
    with pytest.raises(CacheError, match="images 0 to 3 of set have changed since"):
        add_encoders(folder, out, encoders=encoder, progress=False)
    two.write_bytes(one.read_bytes())
    one.write_bytes(data)
    assert add_encoders(folder, out, encoders=encoder, progress=False).features
