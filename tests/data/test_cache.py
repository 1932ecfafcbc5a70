"""The cache: rows are what was encoded, damage is found, and the wrong cache is refused."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erw.data import Batch, Cache, open_source
from erw.data.cache import map_columns
from erw.data.images import crop
from erw.data.prepare import add_encoders
from erw.data.quantize import FORMATS, pack, unpack
from erw.data.writer import write_columns
from erw.encoders import load_encoder, load_vae
from erw.errors import CacheError, DataError
from erw.io import hash_file
from helpers.parts import CLASSES, ENCODER, make, photos, two_caches, vae_folder, write_checked

Parts = SimpleNamespace


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """Photos, a VAE and a cache of both variants, features and images."""
    root = tmp_path_factory.mktemp("cache")
    vae, folder = vae_folder(root / "vae"), photos(root / "set")
    cache = make(folder, root / "made", vae, encoder=True, flip=True, images=True)
    yield Parts(root=root, vae=vae, folder=folder, cache=cache)


@pytest.fixture
def copy(made: Parts, tmp_path: Path) -> Path:
    """A copy of the cache, to be damaged."""
    return Path(shutil.copytree(made.root / "made", tmp_path / "copy"))


def test_rows_are_what_the_networks_give(made: Parts) -> None:
    cache, source = made.cache, open_source(made.folder)
    vae, encoder = load_vae(made.vae), load_encoder(ENCODER)
    rows = [23, 0, 8, 8]
    batch = cache.read(rows, features=[ENCODER])
    squares = np.stack([crop(source[i][0], 32) for i in rows])
    images = torch.from_numpy(squares).permute(0, 3, 1, 2)
    with torch.no_grad():
        mean, std = vae.encode(images).chunk(2, 1)
        tokens = encoder(images)
    torch.testing.assert_close(batch.mean, (mean - vae.shift) * vae.scale, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.std, std * vae.scale, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.features[0], tokens, atol=2e-2, rtol=2e-3)
    assert batch.labels.tolist() == [2, 0, 1, 1] and batch.labels.dtype == torch.int64
    assert torch.equal(cache.images(rows), images)
    assert cache.columns(["item"], rows)["item"].tolist() == rows


def test_the_flipped_variant_is_of_the_mirrored_image(made: Parts) -> None:
    images = made.cache.images([3, 4]).flip(-1)
    batch = made.cache.read([3, 3, 4], features=[ENCODER], flipped=np.array([True, False, True]))
    with torch.no_grad():
        tokens = load_encoder(ENCODER)(images)
    torch.testing.assert_close(batch.features[0][[0, 2]], tokens, atol=2e-2, rtol=2e-3)
    assert not torch.equal(batch.mean[0], batch.mean[1])
    assert torch.equal(made.cache.read([3]).mean[0], batch.mean[1])


def test_what_a_cache_says_about_itself(made: Parts) -> None:
    cache = made.cache
    assert len(cache) == 24 and cache.class_names == CLASSES
    assert cache.latent_shape == (4, 8, 8) and cache.spec.flip
    spec = cache.features[ENCODER]
    assert (spec.dim, spec.grid) == (112, (4, 4))
    assert spec.flops == load_encoder(ENCODER).flops(32) and cache.vae["flops"] > 0
    # Statistics of posterior samples, against the rows themselves.
    both = [cache.read(range(24), flipped=np.full(24, side)) for side in (False, True)]
    vae = load_vae(made.vae)
    mean = torch.cat([b.mean for b in both]) / vae.scale + vae.shift
    std = torch.cat([b.std for b in both]) / vae.scale
    square = (mean**2 + std**2).mean((0, 2, 3)) - mean.mean((0, 2, 3)) ** 2
    torch.testing.assert_close(
        torch.tensor(cache.manifest.latent_mean), mean.mean((0, 2, 3)), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        torch.tensor(cache.manifest.latent_std), square.sqrt(), atol=1e-3, rtol=1e-3
    )


def test_batches_move_and_empty_reads_keep_their_shape(made: Parts) -> None:
    batch = made.cache.read([1, 2], features=[ENCODER]).to("cpu")
    assert isinstance(batch, Batch) and batch.features[0].shape == (2, 16, 112)
    assert made.cache.read([]).mean.shape == (0, 4, 8, 8)
    with pytest.raises(IndexError):
        made.cache.read([24])


def test_shards_are_plain_safetensors(made: Parts) -> None:
    shard = load_file(made.cache.path / "shards" / "00001.safetensors")
    moments = shard["moments"]  # row, variant, mean and std of 4 channels
    assert moments.dtype == torch.float16 and moments.shape == (7, 2, 8, 8, 8)
    assert shard["item"].tolist() == list(range(7, 14))
    assert set(shard) == {"label", "item", "moments"}
    features = load_file(made.cache.path / "shards" / "00001.0.safetensors")
    assert features[f"features.{ENCODER}"].shape == (7, 2, 16, 112) and len(features) == 1
    images = load_file(made.cache.path / "shards" / "00001.images.safetensors")
    assert images["image"].shape == (7, 3, 32, 32) and len(images) == 1


def test_a_shard_reads_back_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    columns = {
        "b": torch.randint(-9, 9, (5, 3), generator=draw, dtype=torch.int8),
        "a": torch.randn(5, 2, 3, generator=draw).half(),
        "c": torch.randn(5, 1, generator=draw).bfloat16(),
        "d": torch.arange(5),
    }
    written = write_columns(tmp_path / "x.safetensors", columns)
    backwards = write_columns(tmp_path / "y.safetensors", dict(reversed(columns.items())))
    assert written.blake3 == backwards.blake3 == hash_file(tmp_path / "x.safetensors")
    assert written.bytes == (tmp_path / "x.safetensors").stat().st_size
    kinds = {"b": ("int8", (3,)), "a": ("float16", (2, 3)), "c": ("bfloat16", (1,))}
    kinds["d"] = ("int64", ())
    mapped = map_columns(tmp_path / "x.safetensors", kinds, rows=5)
    assert all(torch.equal(mapped[name], column) for name, column in columns.items())
    with pytest.raises(CacheError, match=r"has int64 \(5,\) as d, not int32 \(5,\)"):
        map_columns(tmp_path / "x.safetensors", {"d": ("int32", ())}, rows=5)
    with pytest.raises(CacheError, match=r"has .* as b, not int8 \(4, 3\)"):
        map_columns(tmp_path / "x.safetensors", kinds, rows=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_keep_directions(kind: str) -> None:
    tokens = torch.randn(64, 16, 96, generator=torch.Generator().manual_seed(0))
    tokens[3, 4] = 0
    packed = pack(tokens, kind)
    cosine = torch.nn.functional.cosine_similarity(tokens, unpack(packed), dim=-1)
    assert cosine[tokens.any(-1)].mean() > 0.9999
    assert torch.equal(unpack(packed)[3, 4], tokens[3, 4])


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_features_that_do_not_fit_are_refused(kind: str) -> None:
    tokens = torch.ones(2, 3)
    tokens[1, 1] = float("inf")
    with pytest.raises(DataError, match="do not fit"):
        pack(tokens, kind)


def test_int8_keeps_real_features(made: Parts, tmp_path: Path) -> None:
    cache = make(made.folder, tmp_path / "int8", made.vae, encoder=True, features="int8")
    full = made.cache.read(range(24), features=[ENCODER]).features[0]
    small = cache.read(range(24), features=[ENCODER]).features[0]
    cosine = torch.nn.functional.cosine_similarity(full, small, dim=-1)
    assert cosine.mean() >= 0.9999


@pytest.mark.parametrize("kind", FORMATS)
def test_what_a_device_unpacks_is_what_is_read(made: Parts, tmp_path: Path, kind: str) -> None:
    cache = make(made.folder, tmp_path / kind, made.vae, encoder=True, features=kind)
    rows = [5, 1, 20]
    stored = cache.read(rows, features=[ENCODER], packed=True)
    assert stored.features[0].values.dtype == getattr(torch, kind)
    unpacked = cache.read(rows, features=[ENCODER]).features[0]
    assert torch.equal(stored.to("cpu").features[0], unpacked)
    assert torch.equal(stored.to("cpu").mean, cache.read(rows).mean)


def test_one_flipped_bit_is_found_and_the_shard_named(copy: Path) -> None:
    path = copy / "shards" / "00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert Cache.open(copy).verify() == ["00002.safetensors"]


def test_a_whole_cache_verifies(made: Parts) -> None:
    assert made.cache.verify() == []


def test_a_shard_cut_short_or_missing_is_named(copy: Path) -> None:
    path = copy / "shards" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"00001\.safetensors is cut short .*\d+ of \d+ bytes"):
        Cache.open(copy)
    path.unlink()
    with pytest.raises(
        CacheError, match=r"00001\.safetensors is cut short or missing .0 of \d+ bytes"
    ):
        Cache.open(copy)


def test_a_header_of_rubbish_is_an_error_of_ours(copy: Path) -> None:
    path = copy / "shards" / "00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(b"\xff" * 64 + data[64:])
    with pytest.raises(CacheError, match="damaged"):
        Cache.open(copy).read([0])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "cannot be read"), ('{"version": 99}', "version is 99")],
)
def test_a_bad_manifest(copy: Path, text: str, message: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CacheError, match=message):
        Cache.open(copy)


def test_no_cache_and_an_unfinished_one(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no cache at .*erw prepare"):
        Cache.open(tmp_path / "nothing")
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match="or an unfinished one"):
        Cache.open(copy)
    (copy / "prepare.json").unlink()
    with pytest.raises(CacheError, match="no cache at"):
        Cache.open(copy)


def test_labels_out_of_range_are_found(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["class_names"] = manifest["class_names"][:2]
    del manifest["class_counts"]  # as in caches of an older erw
    with pytest.raises(
        CacheError,
        match=r"manifest.json cannot be read: .*\(its content does not match its checksu",
    ):
        path.write_text(json.dumps(manifest))
        Cache.open(copy)
    write_checked(copy, manifest)
    with pytest.raises(CacheError, match="label 2 but 2 classes"):
        Cache.open(copy).read([20])


def test_the_wrong_cache_is_refused_with_the_command_for_the_right_one(made: Parts) -> None:
    cache = made.cache
    cache.require(encoders=[ENCODER], tokens=16)
    with pytest.raises(CacheError, match=r"features of efficientnet.*not of dinov2-b.*--encoders"):
        cache.require(encoders=["dinov2-b"])
    with pytest.raises(CacheError, match=r"4 x 4 = 16 tokens an image, the model has 64"):
        cache.require(encoders=[ENCODER], tokens=64)
    with pytest.raises(CacheError, match=r"no class token of .*--class-token"):
        cache.require(token=ENCODER)


def test_what_was_not_stored_is_not_made_up(made: Parts, tmp_path: Path) -> None:
    plain = make(made.folder, tmp_path / "plain", made.vae)
    with pytest.raises(CacheError, match="--images"):
        plain.images([0])
    with pytest.raises(CacheError, match="no flipped variant"):
        plain.read([0], flipped=np.array([True]))
    assert torch.equal(plain.read([5]).mean, made.cache.read([5]).mean)
    assert plain.identity != made.cache.identity


def test_a_header_that_tells_another_type_is_an_error(copy: Path) -> None:
    for path in (copy / "shards").glob("?????.safetensors"):
        data = path.read_bytes()
        path.write_bytes(
            data.replace(b'"moments":{"dtype":"F16"', b'"moments":{"dtype":"BF16"', 1).replace(
                b"} ", b"}", 1
            )
        )
    with pytest.raises(CacheError, match=r"has bfloat16 .* as moments, not float16"):
        Cache.open(copy).read([0])


def test_a_cache_goes_to_another_process_by_its_path(made: Parts) -> None:
    again = pickle.loads(pickle.dumps(made.cache))
    assert torch.equal(again.read([3]).mean, made.cache.read([3]).mean)


def test_several_caches_read_as_one(tmp_path: Path) -> None:
    parts = two_caches(tmp_path)
    first, second = (Cache.open(tmp_path / name) for name in ("first", "second"))
    both = Cache.open((tmp_path / "first", tmp_path / "second"))
    assert len(both) == 34 and both.class_names == ("apple", "bear", "cup", "Zebra")
    a = first.read(range(24), features=[ENCODER])
    b = second.read(range(10), features=[ENCODER])
    rows = both.read(range(34), features=[ENCODER])
    assert torch.equal(rows.mean, torch.cat([a.mean, b.mean]))
    assert torch.equal(rows.features[0], torch.cat([a.features[0], b.features[0]]))
    # In the second cache Zebra comes first; here it has the first free number.
    assert rows.labels.tolist() == [*a.labels.tolist(), *[3] * 5, *[1] * 5]
    assert both.identity not in (first.identity, second.identity) and both.verify() == []
    assert torch.equal(pickle.loads(pickle.dumps(both)).read([30]).mean, rows.mean[[30]])
    bare = make(parts.more, tmp_path / "bare", parts.vae)
    assert not Cache.open([tmp_path / "first", bare.path]).features
    for options, message in (
        ({"encoder": True, "features": "int8"}, r"0@64\.format \(float16, now int8\); prepare"),
        ({"image_size": 16}, r"latent_shape \(\[4, 8, 8\], now \[4, 4, 4\]\)"),
    ):
        other = make(parts.more, tmp_path / str(options)[2:6], parts.vae, **options)
        with pytest.raises(CacheError, match=message):
            Cache.open([tmp_path / "first", other.path])


def test_a_cache_of_the_version_before_is_read_but_not_changed(tmp_path: Path) -> None:
    """Made by it: two images, two appended to them, and an encoder added later; int8, flipped."""
    path = Path(__file__).parents[1] / "golden" / "cache_format_2"
    cache = Cache.open(path)
    assert cache.identity == "e80837d6d7f452fa35cf9fb237105dc9" and cache.verify() == []
    assert cache.class_names == ("a", "b", "c") and len(cache) == 4
    encoders = ["efficientnet-lite0@32", "efficientnet-lite2@32"]
    batch = cache.read(range(4), features=encoders, flipped=np.array([0, 1, 0, 1], dtype=bool))
    assert batch.labels.tolist() == [0, 1, 1, 2] and int(cache.images([2]).sum()) == 23517
    sums = [x.double().sum().item() for x in (batch.mean, *batch.features)]
    assert sums == pytest.approx([-16.271560668945312, 1231.2744098305702, -852.4117813110352])
    copy = shutil.copytree(path, tmp_path / "copy")
    with pytest.raises(CacheError, match=r"copy was begun with other settings: source\.count"):
        add_encoders(
            photos(tmp_path / "set"), copy, encoders=["efficientnet-lite0@64"], progress=False
        )


def test_a_manifest_names_files_not_paths(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["files"][0][0] = "../../00000.safetensors"
    write_checked(copy, manifest)
    with pytest.raises(
        CacheError, match=r"cannot be read: .*\(a path where the name of a file was expected"
    ):
        Cache.open(copy)
