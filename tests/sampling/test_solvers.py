"""Solvers and guidance: REPA's samplers reproduced, known flows integrated."""

import json
import sys
import textwrap
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erw.errors import ConfigError, NumericsError
from erw.flow import PATHS, Path, ends, velocity_from
from erw.models.sit import SiT
from erw.sampling import solvers
from erw.sampling.guidance import classifier_free
from erw.sampling.solvers import SOLVERS, sde_times, uniform_times
from helpers.reference import Golden

euler, heun, adams, euler_maruyama, dopri5, *_ = SOLVERS.values()


def array(tag: str, *shape: int) -> np.ndarray:
    """The golden files' rule that makes every array."""
    state = np.random.RandomState(zlib.crc32(f"1:{tag}".encode()))
    return state.standard_normal(shape).astype(np.float32)


def golden_net(meta: dict[str, Any]) -> SiT:
    net = SiT(
        input_size=meta["input_size"],
        patch=meta["patch_size"],
        depth=meta["depth"],
        width=meta["hidden_size"],
        heads=meta["num_heads"],
        num_classes=meta["num_classes"],
    )
    weights = {
        key: value if key == "pos_embed" else torch.tensor(0.12 * array("w:" + key, *value.shape))
        for key, value in net.state_dict().items()
    }
    net.load_state_dict(weights)
    return net.eval()


@pytest.mark.parametrize(
    "name",
    [
        "euler",
        "euler_cfg_interval",
        "heun",
        "heun_cfg",
        "sde",
        "sde_cfg_interval",
        "sde_cosine",
    ],
)
def test_repas_samplers(golden: Golden, name: str) -> None:
    data = golden(f"sampler_{name}")
    meta = json.loads(str(data["meta"]))
    net, y = golden_net(meta), torch.tensor(data["y"])
    velocity = classifier_free(
        net,
        y,
        net.null_class,
        scale=meta.get("cfg_scale", 1.0),
        interval=(meta.get("guidance_low", 0.0), meta.get("guidance_high", 1.0)),
    )
    chosen = SOLVERS["euler_maruyama" if "sde" in name else name.split("_")[0]]
    draws: list[int] = []

    def noise(step: int, x: Tensor) -> Tensor:
        draws.append(step)
        return torch.tensor(array(f"sde{step}", *x.shape))

    with torch.no_grad():
        x = chosen(
            velocity,
            torch.tensor(data["latents"]),
            chosen.times(meta["num_steps"]),
            path=PATHS[meta.get("path_type", "linear")],
            noise=noise,
        )
    expected = torch.tensor(data["out"])
    assert len(draws) == meta["draws"]
    assert x.dtype == torch.float64
    assert (x - expected).norm() <= 1e-4 * expected.norm()


def test_a_straight_flow_is_exact_in_one_step() -> None:
    # Data at one point c: on the linear path v = (x - c) / t, and every path is a straight line.
    c = 0.7
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    for solve in (euler, heun, adams):
        out = solve(lambda x, t: (x - c) / t, x, uniform_times(1))
        assert torch.allclose(out, torch.full_like(x, c))


def test_orders_of_convergence() -> None:
    # dx = -x dt from t = 1 to 0 ends at x e.
    def error(solve: Any, steps: int) -> float:
        x = torch.ones(1, dtype=torch.float64)
        out = solve(lambda x, t: -x, x, uniform_times(steps))
        return abs(out.item() - np.e)

    assert error(euler, 40) / error(euler, 80) == pytest.approx(2, rel=0.1)
    assert error(adams, 80) / error(adams, 160) == pytest.approx(4, rel=0.1)
    # The last step is an Euler step, of local order 2, so the whole is still of order 2.
    assert error(heun, 80) / error(heun, 160) == pytest.approx(4, rel=0.1)


def test_a_solver_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the module's documentation: the midpoint rule, of order 2."""
    example = str(solvers.__doc__).split(":\n\n")[1].split("\n\nSources")[0]
    monkeypatch.setattr(solvers, "SOLVERS", dict(SOLVERS))
    exec(textwrap.dedent(example), names := vars(solvers).copy())
    midpoint = names["SOLVERS"]["midpoint"]
    x = torch.ones(1, dtype=torch.float64)
    errors = [midpoint(lambda x, t: -x, x, uniform_times(n)).item() - np.e for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert midpoint.evaluations(7) == 14


def test_adams_is_exact_where_the_slope_is_linear_in_time_on_uneven_steps() -> None:
    # dx = t dt from 1 to 0 ends at x - 1/2; only the first, an Euler step, errs: by h^2 / 2.
    times = [1.0, 0.9, 0.5, 0.35, 0.0]
    out = adams(lambda x, t: torch.full_like(x, t), torch.zeros(1).double(), times)
    assert out.item() == pytest.approx(-0.5 - 0.1**2 / 2)


MEAN, SPREAD = 1.5, 0.5


def exact(prediction: str, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """The best a network can give for data from N(MEAN, SPREAD^2), in closed form."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    off = (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    clean, eps = MEAN + alpha * SPREAD**2 * off, sigma * off
    if prediction == "velocity":
        return path.d_alpha(t) * clean + path.d_sigma(t) * eps
    return {"x": clean, "noise": eps, "score": -off}[prediction]


@pytest.mark.parametrize("prediction", ["velocity", "x", "noise", "score"])
@pytest.mark.parametrize("path", PATHS.values(), ids=lambda path: path.name)
def test_every_prediction_on_every_path_draws_the_same_gaussian(
    path: Path, prediction: Any
) -> None:
    """Expressed as a noise, a score or a clean latent, the exact velocity gives the same samples;
    the ODE and the SDE end at the distribution of the data."""

    def velocity(x: Tensor, t: float) -> Tensor:
        now = torch.tensor(t, dtype=x.dtype)
        output = exact(prediction, path, x, now)
        return velocity_from(prediction, output, x, now, path=path)

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, dtype=torch.float64, generator=rng)
    noise = lambda step, like: torch.randn(len(like), generator=rng)  # noqa: E731
    high = ends("noise", path)[1]  # the same times for all
    sde = (euler_maruyama, sde_times(250, last=0.01))
    for solve, times in ((heun, uniform_times(50)), sde, (dopri5, [1.0, 1e-3, 0.0])):
        times = [high * times[0], *times[1:]]
        out = solve(velocity, x, times, path=path, noise=noise)
        assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert out.std().item() == pytest.approx(SPREAD, abs=0.02)
        if solve is not euler_maruyama:
            plain = lambda x, t: exact("velocity", path, x, torch.tensor(t).double())  # noqa: E731
            torch.testing.assert_close(out, solve(plain, x, times, path=path), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].evaluations])
def test_evaluations_and_times(name: str) -> None:
    chosen, calls = SOLVERS[name], []

    def velocity(x: Tensor, t: float) -> Tensor:
        assert x.dtype == torch.float32
        calls.append(t)
        return torch.zeros_like(x).repeat(1, 2 if chosen.objective == "ddpm" else 1)

    times = chosen.times(7)
    chosen(velocity, torch.randn(2, 3), times)
    assert len(calls) == chosen.evaluations(7)
    assert sorted({*calls, 0.0}, reverse=True) == times
    assert len(times) == 8 and times[0] == 1 and times[-1] == 0


def test_dopri5_keeps_its_tolerance_inside_the_interval() -> None:
    # dx = (-x + 3 sin 6 t) dt, whose solution is known.
    times_called: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times_called.append(t)
        return -x + 3 * np.sin(6 * t)

    def particular(t: float) -> float:
        return 3 * (np.sin(6 * t) - 6 * np.cos(6 * t)) / 37

    x, expected = torch.tensor([[1.0]], dtype=torch.float64), particular(0.0)
    expected += (1 - particular(1.0)) * np.e
    errors = []
    for tolerance in (1e-4, 1e-8):
        out = dopri5(velocity, x, [1.0, 0.0], atol=tolerance, rtol=tolerance)
        errors.append(abs(out.item() - expected))
    assert errors[0] < 1e-3 and errors[1] < 1e-7
    assert 0 <= min(times_called) < 1e-9 and max(times_called) == 1  # never beyond the ends
    # Behind the interval that it decides about, one Euler step.
    ends = [dopri5(velocity, x, times, rtol=1e-9) for times in ([1.0, 0.1], [1.0, 0.1, 0.0])]
    torch.testing.assert_close(ends[1], ends[0] - 0.1 * velocity(ends[0], 0.1))
    with pytest.raises(NumericsError, match="no step small enough"):
        dopri5(lambda x, t: x * float("nan"), x, [1.0, 0.0])


def test_dopri5_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ConfigError, match=r"dopri5 needs torchdiffeq: pip install 'erw\[ode\]'"):
        dopri5(lambda x, t: x, torch.zeros(1, 1), [1.0, 0.0])


def test_shifted_times_keep_their_ends() -> None:
    even, shifted = uniform_times(10), uniform_times(10, shift=3.0)
    assert (shifted[0], shifted[-1]) == (1, 0)
    assert all(late > plain for late, plain in zip(shifted[1:-1], even[1:-1], strict=True))


@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_shifted_sde_times_keep_both_ends(shift: float) -> None:
    times = sde_times(9, shift=shift)
    assert (times[0], times[-1]) == (1, 0) and times[-2] == pytest.approx(0.04)
    moved = [t > plain for t, plain in zip(times[1:-2], sde_times(9)[1:-2], strict=True)]
    assert all(moved) if shift > 1 else not any(moved)


def test_the_shift_is_lightningdits_with_time_turned() -> None:
    # Its 250 points run from noise (0) to data (1), moved by s t / (1 + (s - 1) t) with s = 0.3.
    t, s = np.linspace(0, 1, 250), 0.3
    theirs = s * t / (1 + (s - 1) * t)
    assert np.allclose(uniform_times(249, shift=1 / s), 1 - theirs)
