"""The moving average is the formula, tensor by tensor, and leaves alone what does not train."""

import math

import pytest
import torch
from torch import Tensor, nn

from erw.ema import WIDEST, Ema, PowerEmas, Profile, exponent, mix, overlaps, width
from erw.errors import ConfigError


def test_average_is_the_formula() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema, wanted = Ema(net, decay=0.9), {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update(net)
        for name, p in net.named_parameters():
            wanted[name] = 0.9 * wanted[name] + 0.1 * p.detach()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ema.tensors[name], tensor)
    averaged = dict(ema.module.named_parameters())
    assert all(torch.equal(averaged[name], tensor) for name, tensor in ema.tensors.items())
    ema.restart(net)
    assert all(torch.equal(averaged[name], p) for name, p in net.named_parameters())


def test_what_does_not_train_is_left_alone() -> None:
    """As in warm-up: later blocks have not moved, so their average is themselves, bit for bit."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = Ema(net, decay=0.9)
    net[1].requires_grad_(False)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ema.update(net)
    assert not torch.equal(ema.tensors["0.weight"], net[0].weight - 1.0)
    assert torch.equal(ema.tensors["1.weight"], net[1].weight)


# -- power functions ------------------------------------------------------------------------------


def test_widths_and_exponents() -> None:
    assert width(0.0) == pytest.approx(WIDEST) and exponent(WIDEST) == pytest.approx(0, abs=1e-6)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)  # the paper's two
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for sigma in (1e-4, 0.003, 0.02, 0.1, 0.25):
        assert width(exponent(sigma)) == pytest.approx(sigma, rel=1e-9)
    for gamma in (1.0, 6.94):  # the standard deviation of tau / t, by sums
        tau = torch.linspace(0, 1, 200_001, dtype=torch.float64)
        p = tau**gamma / (tau**gamma).sum()
        mean = (p * tau).sum()
        assert math.sqrt((p * (tau - mean) ** 2).sum()) == pytest.approx(width(gamma), rel=1e-4)
    for wrong in (0.0, -1.0, 0.29, math.nan):
        with pytest.raises(ConfigError, match="sigma_rel is"):
            exponent(wrong)


def average(values: Tensor, profile: Profile) -> float:
    """The average in closed form: an update adds the profile's share between tau - 1 and tau."""
    power = exponent(profile.sigma_rel) + 1
    edges = torch.arange(profile.t + 1, dtype=torch.float64) / profile.t
    return float((edges**power).diff() @ values[: profile.t])


def walk(steps: int) -> Tensor:
    """A number that walks at random, with steps of deviation 1 over the whole."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(steps, generator=rng, dtype=torch.float64).cumsum(0) / steps**0.5


def test_tracking_is_the_closed_form() -> None:
    net, values = nn.Linear(1, 2, bias=False), walk(300)
    emas = PowerEmas(net, (0.05, 0.2))
    for t, value in enumerate(values, start=1):
        nn.init.constant_(net.weight, float(value))
        emas.update(net, t)
        if t == 1:
            assert all(torch.equal(x["weight"], net.weight) for x in emas.tensors.values())
    for sigma in (0.05, 0.2):
        expected = average(values, Profile(sigma, 300))
        assert emas.tensors[sigma]["weight"][1].item() == pytest.approx(expected, abs=1e-5)


def test_overlaps_are_the_integrals() -> None:
    profiles = [Profile(0.05, 700), Profile(0.1, 700), Profile(0.1, 1000), Profile(0.25, 900)]
    tau = torch.arange(0, 1000, 0.01, dtype=torch.float64) + 0.005
    densities = []
    for sigma, t in profiles:
        gamma = exponent(sigma)
        densities.append(torch.where(tau < t, (gamma + 1) / t * (tau / t) ** gamma, 0.0))
    expected = torch.stack(densities) @ torch.stack(densities).T * 0.01
    assert torch.allclose(overlaps(profiles, profiles), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("sigma", "off"), [(0.03, 0.05), (0.075, 0.01), (0.15, 0.01), (0.25, 0.03)]
)
def test_any_profile_is_mixed_from_two_that_were_tracked(sigma: float, off: float) -> None:
    """Against tracking it directly; widths outside those tracked are harder, narrow ones most."""
    values = walk(4000)
    stored = [Profile(s, t) for t in range(100, 4001, 100) for s in (0.05, 0.1)]
    found = mix(stored, Profile(sigma, 4000))
    assert found.weights.sum() == pytest.approx(1) and found.error < off
    mixed = sum(float(w) * average(values, p) for w, p in zip(found.weights, stored, strict=True))
    assert mixed == pytest.approx(average(values, Profile(sigma, 4000)), abs=off * 0.5)


def test_a_stored_profile_is_itself_and_more_snapshots_are_nearer() -> None:
    stored = [Profile(s, t) for t in (100, 200, 400) for s in (0.05, 0.1)]
    for i, profile in enumerate(stored):
        found = mix(stored, profile)
        assert found.error == 0 and found.weights.tolist() == [float(j == i) for j in range(6)]
    wanted = Profile(0.2, 400)
    errors = [mix(stored[-n:], wanted).error for n in (2, 4, 6)]
    assert errors[0] > errors[1] > errors[2] > 0
