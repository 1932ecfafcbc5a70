"""Paths, predictions, scores and times: identities in closed form."""

import math

import pytest
import torch

from erw import flow

X, EPS = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
T = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
BOTH = pytest.mark.parametrize("path", [flow.LINEAR, flow.COSINE], ids=lambda p: p.name)


def test_t_0_is_data_and_t_1_is_noise():
    for path in flow.PATHS.values():
        assert torch.allclose(flow.noise(X, EPS, torch.zeros(5), path=path).x_t, X, atol=1e-7)
        assert torch.allclose(flow.noise(X, EPS, torch.ones(5), path=path).x_t, EPS, atol=1e-7)


def test_the_linear_velocity_is_noise_minus_data():
    assert torch.equal(flow.noise(X, EPS, T).velocity, EPS - X)


@BOTH
def test_the_velocity_is_the_derivative_of_the_path(path):
    h = 1e-6
    ahead, behind = (flow.noise(X, EPS, T + d, path=path).x_t for d in (h, -h))
    assert torch.allclose((ahead - behind) / (2 * h), flow.noise(X, EPS, T, path=path).velocity)


@BOTH
@pytest.mark.parametrize("prediction", ["velocity", "x", "noise"])
def test_every_perfect_prediction_gives_the_same_velocity(path, prediction):
    noised = flow.noise(X, EPS, T, path=path)
    output = flow.target(X, noised, prediction)
    v = flow.velocity_from(prediction, output, noised.x_t, T, path=path)
    assert torch.allclose(v, noised.velocity)


@BOTH
def test_the_score_of_one_known_image(path):
    """For a single data point, p_t is Gaussian and its score is -(x_t - alpha x) / sigma^2."""
    noised = flow.noise(X, EPS, T, path=path)
    score = flow.score_from_velocity(noised.velocity, noised.x_t, T, path=path)
    assert torch.allclose(score, -EPS / path.sigma(flow.over(T, X)))


@BOTH
def test_logit_normal_times_have_normal_log_ratios(path):
    normal = torch.randn(1000, dtype=torch.float64)
    t = flow.sample_times(torch.empty(0), normal, times="logit_normal", path=path)
    assert torch.allclose((path.sigma(t) / path.alpha(t)).log(), normal, atol=1e-6)
    assert math.isclose(float(t[normal.argsort()].diff().min().sign()), 1.0)


def test_uniform_times_are_the_uniform_numbers():
    u = torch.rand(8)
    assert flow.sample_times(u, torch.empty(0), times="uniform") is u
