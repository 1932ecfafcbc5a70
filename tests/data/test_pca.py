"""Principal components of features: fitted once a cache, kept as it grows."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from erw.data import Cache
from erw.data.pca import components, numbers
from erw.encoders import load_encoder
from erw.errors import CacheError, ConfigError
from helpers.growing import OTHER, Parts, add, damage, grown_parts
from helpers.parts import ENCODER, files, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return grown_parts(tmp_path_factory.mktemp("grow"))


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
