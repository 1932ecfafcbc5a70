"""Paths, predictions, scores and times: identities in closed form."""

import math

import pytest
import torch
from torch import Tensor

from erw import flow
from helpers.reference import Golden, tensors

X, EPS = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
T = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
EVERY = pytest.mark.parametrize("path", flow.PATHS.values(), ids=lambda p: p.name)
PREDICTIONS = ["velocity", "x", "noise", "score"]


def test_t_0_is_data_and_t_1_is_noise() -> None:
    for path in (flow.LINEAR, flow.COSINE):
        assert torch.allclose(flow.noise(X, EPS, torch.zeros(5), path=path).x_t, X, atol=1e-7)
        assert torch.allclose(flow.noise(X, EPS, torch.ones(5), path=path).x_t, EPS, atol=1e-7)


def test_the_variance_preserving_path_is_that_of_its_noise_rate() -> None:
    """alpha^2 + sigma^2 = 1, and alpha is the solution of alpha' = -beta alpha / 2 from 1."""
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    integral = torch.cumulative_trapezoid(beta, t)
    torch.testing.assert_close(flow.VP.alpha(t[1:]), (-integral / 2).exp(), rtol=1e-6, atol=0)
    torch.testing.assert_close(flow.VP.alpha(t) ** 2 + flow.VP.sigma(t) ** 2, torch.ones_like(t))
    assert flow.VP.sigma(t[0]) == 0 and flow.VP.alpha(t[-1]) < 0.007
    # For float32, sigma keeps its digits where 1 - alpha^2 would have none.
    small = torch.tensor(1e-5)
    torch.testing.assert_close(flow.VP.sigma(small).double(), flow.VP.sigma(small.double()))


def test_the_linear_velocity_is_noise_minus_data() -> None:
    assert torch.equal(flow.noise(X, EPS, T).velocity, EPS - X)


@EVERY
def test_the_velocity_is_the_derivative_of_the_path(path: flow.Path) -> None:
    h = 1e-6
    ahead, behind = (flow.noise(X, EPS, T + d, path=path).x_t for d in (h, -h))
    assert torch.allclose((ahead - behind) / (2 * h), flow.noise(X, EPS, T, path=path).velocity)


def perfect(prediction: str, x: Tensor, noised: flow.Noised, path: flow.Path) -> Tensor:
    """What a network gives whose training loss is 0."""
    sigma = path.sigma(flow.over(noised.t, x))
    targets = {"velocity": noised.velocity, "x": x, "noise": noised.noise}
    return targets.get(prediction, -noised.noise / sigma)


@EVERY
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_perfect_prediction_gives_the_same_velocity(path: flow.Path, prediction: str) -> None:
    noised = flow.noise(X, EPS, T, path=path)
    output = perfect(prediction, X, noised, path)
    off = flow.residual(prediction, output, X, noised, path=path)
    assert torch.allclose(off, torch.zeros_like(off))
    v = flow.velocity_from(prediction, output, noised.x_t, T, path=path)
    assert torch.allclose(v, noised.velocity)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("theirs", ["Linear", "GVP", "VP"])
def test_velocities_and_losses_of_sits_transport(
    golden: Golden, theirs: str, prediction: str
) -> None:
    """Its time runs the other way: velocities change sign, noise and score do not."""
    data, _ = tensors(golden("sit_transport"))
    path = flow.PATHS[{"Linear": "linear", "GVP": "cosine", "VP": "vp"}[theirs]]
    x, t, out = data["x"], 1 - data["t"], data["out"]
    noised = flow.noise(x, data["noise"], t, path=path)
    torch.testing.assert_close(noised.x_t, data[f"{theirs}_x_t"])
    out = -out if prediction == "velocity" else out
    v = flow.velocity_from(prediction, out, noised.x_t, t, path=path)
    torch.testing.assert_close(-v, data[f"{theirs}_{prediction}_drift"])
    loss = flow.residual(prediction, out, x, noised, path=path).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, data[f"{theirs}_{prediction}_loss"])


@EVERY
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_ends_of_the_path_are_finite_and_continuous(path: flow.Path, prediction: str) -> None:
    """In float32; beyond `ends` the coefficients are those of the end, so that nothing runs off."""
    low, high = flow.ends(prediction, path)
    x, eps = X.float(), EPS.float()
    for t, end in ((0.0, low), (1.0, high)):
        at = [torch.full((5,), value) for value in (t, end)]
        noised = flow.noise(x, eps, at[1], path=path)
        output = perfect(prediction, x, noised, path)
        output = torch.nan_to_num(output, neginf=0, posinf=0)  # the score of clean data
        v = [flow.velocity_from(prediction, output, noised.x_t, time, path=path) for time in at]
        assert torch.isfinite(v[0]).all() and torch.isfinite(v[1]).all()
        if t != end:
            assert torch.equal(v[0], v[1])
            assert torch.allclose(v[1], noised.velocity, rtol=1e-3, atol=1e-3)


@EVERY
def test_the_score_of_one_known_image(path: flow.Path) -> None:
    """For a single data point, p_t is Gaussian and its score is -(x_t - alpha x) / sigma^2."""
    noised = flow.noise(X, EPS, T, path=path)
    score = flow.score_from_velocity(noised.velocity, noised.x_t, T, path=path)
    assert torch.allclose(score, -EPS / path.sigma(flow.over(T, X)))


@EVERY
def test_logit_normal_times_have_normal_log_ratios(path: flow.Path) -> None:
    normal = torch.randn(1000, dtype=torch.float64)
    t = flow.sample_times(torch.empty(0), normal, times="logit_normal", path=path)
    assert torch.allclose((path.sigma(t) / path.alpha(t)).log(), normal, atol=1e-6)
    assert math.isclose(float(t[normal.argsort()].diff().min().sign()), 1.0)


@pytest.mark.parametrize("shift", [0.3, 2.5])
def test_a_shift_multiplies_noise_over_data(shift: float) -> None:
    normal = torch.randn(1000, dtype=torch.float64)
    t = flow.sample_times(torch.empty(0), normal, times="logit_normal", shift=shift)
    assert torch.allclose(torch.logit(t), normal + math.log(shift))
    u = torch.rand(100, dtype=torch.float64)
    moved = flow.sample_times(u, torch.empty(0), times="uniform", shift=shift)
    assert torch.allclose(flow.shifted(moved, 1 / shift), u)


def test_the_direction_loss_knows_no_length() -> None:
    v = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    assert flow.direction_loss(5 * v, v).abs() < 1e-12
    assert torch.allclose(flow.direction_loss(-v, v), torch.tensor(2.0, dtype=torch.float64))


def test_uniform_times_are_the_uniform_numbers() -> None:
    u = torch.rand(8)
    assert flow.sample_times(u, torch.empty(0), times="uniform") is u
