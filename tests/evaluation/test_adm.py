"""ADM's metrics from images to scores, with random weights in a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erw import evaluate
from erw.cli import main
from erw.errors import ConfigError, DataError
from erw.evaluation.distances import Moments, frechet, kid, precision_recall
from erw.evaluation.evaluate import with_stated
from erw.evaluation.features import Extractor, Statistics, extract
from erw.evaluation.images import image_set
from erw.evaluation.inception import POOL, SPATIAL, Inception
from helpers.images import stripes as pictures
from helpers.inception import pool_and_spatial

SIZES = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


REAL, FAKE = pictures(6), pictures(5, first=6)


@pytest.fixture(scope="module")
def features(net: Inception) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pool and spatial features of the real and of the fake images."""
    return pool_and_spatial(net, REAL), pool_and_spatial(net, FAKE)


def npz(path: Path, images: Tensor, **more: np.ndarray) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def test_the_five_scores_are_adms(
    tmp_path: Path, weights: Path, net: Inception, features: Any
) -> None:
    found = evaluate(
        npz(tmp_path / "fake.npz", FAKE),
        reference=npz(tmp_path / "real.npz", REAL),
        metric="adm",
        weights=weights,
        cache=tmp_path,
        batch_size=4,
    )
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    assert tuple(found.values) == names
    a, b = features
    for name, x, y in zip(("fid", "sfid"), a, b, strict=True):
        assert found[name] == pytest.approx(frechet(Moments.of(x), Moments.of(y)), rel=1e-4), name
    p = torch.softmax((b[0] @ net.fc.weight.T).double(), 1)
    divergence = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert found["inception_score"] == pytest.approx(divergence.exp().item(), rel=1e-5)
    assert (found["precision"], found["recall"]) == precision_recall(a[0], b[0], k=3)
    record = json.loads(json.dumps(found.to_dict()))
    network = record["features"]["fid"]
    assert network["encoder"] == "inception-2015-adm" and record["reference_statistics"] == "images"


def test_statistics_stated_by_the_reference_are_used(
    tmp_path: Path, weights: Path, features: Any
) -> None:
    """Against N(mu, 1) the distance is a closed form of the images' own eigenvalues."""
    rng = np.random.default_rng(0)
    stated = {"mu": rng.random(POOL), "mu_s": rng.random(SPATIAL)}
    stated |= {"sigma": np.eye(POOL), "sigma_s": np.eye(SPATIAL)}
    reference = npz(tmp_path / "VIRTUAL_tiny.npz", REAL, **stated)
    found = evaluate(FAKE, reference=reference, metric="adm", weights=weights, cache=tmp_path)
    assert found.reference_statistics == "stated" and found.reference_count == 6
    (real_pool, _), (pool, spatial) = features
    for name, x, mean in (("fid", pool, "mu"), ("sfid", spatial, "mu_s")):
        x = x.double()
        roots = torch.linalg.svdvals((x - x.mean(0)) / 2)  # the deviations: N - 1 = 4
        gap = (x.mean(0) - torch.from_numpy(stated[mean])).square().sum()
        expected = gap + x.shape[1] + roots.square().sum() - 2 * roots.sum()
        assert found[name] == pytest.approx(expected.item(), rel=1e-6), name
    # precision and recall are of the file's images
    assert (found["precision"], found["recall"]) == precision_recall(real_pool, pool)


def test_stated_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    plain = Statistics(Moments.of(torch.randn(9, 3)), torch.empty(9, 0))
    good = {name: np.zeros(size, np.float32) for name, size in SIZES.items()}
    same, stated = with_stated(plain, npz(tmp_path / "plain.npz", pictures(2)))
    assert same is plain and not stated
    path = npz(tmp_path / "few.npz", pictures(2), mu=good["mu"])
    with pytest.raises(DataError, match="sigma"):
        with_stated(plain, path)
    path = npz(tmp_path / "other.npz", pictures(2), **(good | {"mu": np.zeros(768)}))
    with pytest.raises(DataError, match=r"'mu': \(768,\).*expected .*'mu': \(2048,\)"):
        with_stated(plain, path)


def test_only_pool_features_are_kept(net: Inception) -> None:
    assert net.pooled(pictures(1)).shape == (1, POOL + SPATIAL) and net.kept == POOL
    one = extract(image_set(pictures(3)), {"adm": Extractor(net, kept=net.kept)})["adm"]
    assert one.features.shape == (3, POOL) and one.moments.mean.shape == (POOL + SPATIAL,)


@pytest.mark.parametrize("count", [5, 40])
def test_few_images_have_the_distance_of_their_whole_covariance(count: int) -> None:
    x, y = (torch.randn(count, 60, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a, b = Moments.of(x), Moments.of(y + 0.3)
    many = Moments(10**6, b.mean, b.cov * (10**6 - 1))  # as if the count were not known
    assert frechet(a, b) == pytest.approx(frechet(a, many), rel=1e-9)
    part = slice(10, 30)
    assert torch.allclose(a.part(part).cov, Moments.of(x[:, part]).cov)


def test_eval_adm_from_the_command_line(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = npz(tmp_path / "a.npz", pictures(5))
    reference = str(npz(tmp_path / "b.npz", pictures(5, first=5)))
    command = ["eval", str(images), "--reference", reference, "--metric", "adm"]
    assert main([*command, "--weights", str(weights)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][:2] == ["fid", "sfid"]
    assert main([*command, "--weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth" in capsys.readouterr().err
    assert main([*command[:-1], "fd-lite2", "--weights", str(weights)]) == 2
    assert "without effect" in capsys.readouterr().err


def test_the_familys_names_one_by_one(tmp_path: Path, weights: Path, features: Any) -> None:
    options: dict[str, Any] = {"reference": REAL, "weights": weights, "cache": tmp_path}
    found = evaluate(FAKE, metric=["fid", "kid", "fd-inception", "fd-lite2"], **options)
    assert list(found.values) == ["fid", "kid", "fd_inception", "fd_lite2"]
    (a, _), (b, _) = features
    assert (
        found["fid"]
        == found["fd-inception"]
        == pytest.approx(frechet(Moments.of(a), Moments.of(b)), rel=1e-4)
    )
    assert found["kid"] == pytest.approx(kid(a, b), rel=1e-5)
    with pytest.raises(ConfigError, match="did you mean adm"):
        evaluate(FAKE, reference=REAL, metric="admm")
