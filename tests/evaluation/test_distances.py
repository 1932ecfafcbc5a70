"""Distances, manifold scores and alignment: golden values, closed forms, identities."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from erw.errors import DataError
from erw.evaluation.alignment import cka, cknna
from erw.evaluation.distances import (
    Moments,
    density_coverage,
    frechet,
    inception_score,
    kid,
    precision_recall,
)
from helpers.reference import Golden


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def test_frechet_of_adms_evaluator(golden: Golden) -> None:
    data = golden("fid_pr")
    meta = json.loads(str(data["meta"]))
    real, fake = torch.tensor(data["real"]), torch.tensor(data["fake"])
    value = frechet(Moments.of(real), Moments.of(fake))
    assert value == pytest.approx(meta["fid"], rel=1e-6)
    few = frechet(Moments.of(real[:30]), Moments.of(fake[:25]))
    assert few == pytest.approx(meta["fid_rank_deficient"], rel=1e-6)
    found = precision_recall(real, fake, k=meta["k"], rows=130)
    assert found == pytest.approx((meta["precision"], meta["recall"]), abs=1e-12)


def test_inception_score_of_adms_evaluator(golden: Golden) -> None:
    data = golden("inception_score")
    meta = json.loads(str(data["meta"]))
    value = inception_score(torch.tensor(data["logits"]), split_size=meta["split_size"])
    assert value == pytest.approx(meta["value"], rel=1e-6)


@pytest.mark.parametrize("k", [5, 10])
@pytest.mark.parametrize("kind", ["biased", "unbiased"])
def test_cknna_of_platonic_rep(golden: Golden, k: int, kind: str) -> None:
    data = golden("cknna")
    value = json.loads(str(data["meta"]))["values"][f"k{k}_{kind}"]
    a, b = torch.tensor(data["a"]), torch.tensor(data["b"])
    assert cknna(a, b, k=k, unbiased=kind == "unbiased") == pytest.approx(value, rel=1e-6)


def gaussian(mean: Tensor, cov: Tensor) -> Moments:
    return Moments(101, mean, 100 * cov.double())


def test_frechet_of_gaussians_in_closed_form() -> None:
    # Commuting covariances: |mu1 - mu2|^2 + sum (s1 - s2)^2, in any common rotation.
    turn = torch.linalg.qr(normal(6, 6)).Q
    mu1, mu2 = normal(6, seed=1), normal(6, seed=2)
    s1, s2 = normal(6, seed=3).abs(), torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]).double()
    cov1, cov2 = (turn @ torch.diag(s**2) @ turn.T for s in (s1, s2))
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet(gaussian(mu1, cov1), gaussian(mu2, cov2)) == pytest.approx(
        expected.item(), rel=1e-9
    )
    zero = torch.zeros(6, 6)
    assert frechet(gaussian(mu1, zero), gaussian(mu1, cov2)) == pytest.approx((s2**2).sum().item())
    assert frechet(gaussian(mu1, zero), gaussian(mu1, zero)) == 0


@pytest.mark.parametrize("count", [10, 300])
def test_frechet_of_a_set_with_itself_is_zero(count: int) -> None:
    moments = Moments.of(normal(count, 40) * torch.logspace(-6, 2, 40))
    assert abs(frechet(moments, moments)) < 1e-6
    many = Moments(10**6, moments.mean, moments.cov * (10**6 - 1))  # no bound of the rank
    assert abs(frechet(moments, many)) < 1e-6


def test_frechet_agrees_with_scipy() -> None:
    from scipy.linalg import sqrtm

    a, b = Moments.of(normal(200, 12) @ normal(12, 12)), Moments.of(normal(150, 12, seed=1) + 0.3)
    root = sqrtm((a.cov @ b.cov).numpy()).real.trace()
    mean = ((a.mean - b.mean) ** 2).sum()
    expected = (mean + a.cov.trace() + b.cov.trace()).item() - 2 * root
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)


def test_merged_moments_are_those_of_one_pass() -> None:
    x = normal(101, 7) + 1000  # a mean far from 0, where naive sums lose digits
    whole = Moments.of(x)
    merged = Moments.of(x[:1]) + Moments.of(x[1:40]) + Moments.of(x[40:])
    assert merged.count == 101
    assert torch.allclose(merged.mean, x.mean(0), rtol=1e-13)
    assert torch.allclose(whole.cov, torch.tensor(np.cov(x.numpy(), rowvar=False)), rtol=1e-10)
    assert torch.allclose(merged.cov, whole.cov, rtol=1e-10)


def test_kid_is_unbiased() -> None:
    values = [kid(normal(40, 5, seed=2 * i), normal(40, 5, seed=2 * i + 1)) for i in range(200)]
    mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
    assert abs(mean) < 3 * error
    assert min(values) < 0  # an unbiased estimate of 0 falls on both sides
    assert kid(normal(40, 5), normal(40, 5, seed=1) + 1) > 10 * error
    x, y = normal(30, 4), normal(20, 4, seed=1) * 1.5
    k = lambda a, b: (a @ b.T / 4 + 1) ** 3  # noqa: E731
    within = [(k(z, z).sum() - k(z, z).diag().sum()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = (sum(within) - 2 * k(x, y).mean()).item()
    assert kid(x, y) == pytest.approx(expected, rel=1e-9)


def test_inception_score_between_its_bounds() -> None:
    sure = torch.eye(10).repeat(20, 1) * 100  # every class, never in doubt
    assert inception_score(sure, split_size=100) == pytest.approx(10)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1)


def test_manifold_scores_of_a_set_with_itself_and_of_strangers() -> None:
    x = normal(120, 6)
    assert precision_recall(x, x, k=3, rows=50) == (1, 1)
    assert density_coverage(x, x)[1] == 1
    assert precision_recall(x, x + 100, k=3) == (0, 0)
    assert density_coverage(x, x + 100) == (0, 0)
    # Copies of one real image: all of them are realistic, hardly anything is covered.
    precision, recall = precision_recall(x, x[:1].repeat(50, 1) + 1e-9 * normal(50, 6, seed=1))
    assert precision == 1 and recall <= 1 / 120
    assert density_coverage(x, x[:1].repeat(50, 1))[1] < 0.2


def test_manifold_scores_by_brute_force_in_any_blocks() -> None:
    real, fake = normal(70, 4), normal(50, 4, seed=1) * 1.2
    within = torch.cdist(real, real).sort(1).values[:, 5]  # the first is the feature itself
    inside = torch.cdist(fake, real) < within
    expected = (inside.double().sum().item() / (5 * 50), inside.any(0).double().mean().item())
    for rows in (7, 1024):
        assert density_coverage(real, fake, rows=rows) == pytest.approx(expected)


def test_alignment_identities() -> None:
    a, b = normal(200, 16), normal(200, 8, seed=1)
    turned = a @ torch.linalg.qr(normal(16, 16, seed=2)).Q
    for unbiased in (True, False):
        assert cknna(a, turned, unbiased=unbiased) == pytest.approx(1)
        assert cka(a, 3 * turned, unbiased=unbiased) == pytest.approx(1)
    assert abs(cka(a, b)) < 0.05 and abs(cknna(a, b)) < 0.1


def test_too_few_neighbours_say_so() -> None:
    with pytest.raises(DataError, match="3 neighbours need more than 3"):
        precision_recall(normal(3, 3), normal(9, 3))
    with pytest.raises(DataError, match="k = 9"):
        cknna(normal(9, 3), normal(9, 3), k=9)


def balls(real: Tensor, fake: Tensor, *, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage from differences of features in float64."""
    a, b = real.double(), fake.double()

    def apart(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([(y - row).square().sum(1) for row in x])

    def radii(x: Tensor) -> Tensor:
        return apart(x, x).fill_diagonal_(torch.inf).topk(k, dim=1, largest=False).values[:, -1]

    near, own = apart(b, a), radii(a)
    hits = near <= own
    recalled = (near <= radii(b)[:, None]).any(0)
    shares = (hits.any(1), recalled, hits.any(0))
    precision, recall, coverage = (share.double().mean().item() for share in shares)
    return precision, recall, hits.sum().item() / (k * len(b)), coverage


@pytest.mark.parametrize("kind", ["plain", "duplicates", "outlier", "constant"])
@pytest.mark.parametrize("rows", [32, 1024])
def test_balls_are_those_of_brute_force(kind: str, rows: int) -> None:
    """Whole blocks and parts of them, images twice, on the edge of balls, and one far away."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(150, 48, generator=rng) + 3
    fake = 1.1 * torch.randn(100, 48, generator=rng) + 3
    if kind == "duplicates":
        real[::2], fake[::3] = real[0].clone(), real[1].clone()
    elif kind == "outlier":
        real[7] *= 1e4
    elif kind == "constant":
        real[:], fake[:] = real[0].clone(), real[0].clone()
    for k in (1, 3):
        found = precision_recall(real, fake, k=k, rows=rows)
        found += density_coverage(real, fake, k=k, rows=rows)
        assert found == pytest.approx(balls(real, fake, k=k), abs=1e-12)
