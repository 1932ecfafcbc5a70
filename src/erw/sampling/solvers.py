"""Solvers that carry noise (t = 1) to data (t = 0) along a velocity field; `sampling.steps` says
what they share, and `SOLVERS` names them all, those of DiT's chain too.

Source: REPA (arXiv 2410.06940), section 2 and its samplers; SiT (arXiv 2401.08740), section 2.4.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from erw.errors import ConfigError
from erw.flow import LINEAR, Path, score_from_velocity, shifted
from erw.sampling.adaptive import dopri5, whole_interval
from erw.sampling.chain import chain_times, ddim, ddpm
from erw.sampling.steps import Callback as Callback
from erw.sampling.steps import Noise as Noise
from erw.sampling.steps import Solve, Step
from erw.sampling.steps import Velocity as Velocity


def uniform_times(steps: int, *, shift: float = 1.0) -> list[float]:
    """`steps + 1` evenly spaced times from 1 to 0, then `erw.flow.shifted`.

    Raises ConfigError when `steps` < 1 or `shift` is not above 0.
    """
    if steps < 1:
        raise ConfigError(f"steps = {steps}: a sampler needs at least 1 step")
    _check_shift(shift)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shifted(even, shift).tolist()


def sde_times(steps: int, *, last: float = 0.04, shift: float = 1.0) -> list[float]:
    """`steps` evenly spaced times from 1 to `last`, then 0: the last step is long and without
    noise. `shift` moves the times between the two ends as `erw.flow.shifted` does.

    Raises ConfigError when `steps` < 2, `last` is not between 0 and 1 or `shift` not above 0.
    """
    if steps < 2:
        raise ConfigError(f"steps = {steps}: the SDE sampler needs at least 2 steps")
    if not 0 < last < 1:
        raise ConfigError(f"last = {last}: the last step of the SDE must be between 0 and 1")
    _check_shift(shift)
    end = shifted(torch.tensor(last, dtype=torch.float64), 1 / shift)
    even = torch.linspace(1, float(end), steps, dtype=torch.float64)
    return [*shifted(even, shift).tolist(), 0.0]


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift = {shift}: the time shift must be above 0 (1 = none)")


def euler(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps of the probability flow ODE dx = v dt; one evaluation a step."""
    dtype, x = x.dtype, x.double()
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x.to(dtype), t)
        x = x + (t_next - t) * v.double()
        if callback:
            callback(Step(i, t, t_next, x, v))
    return x


def heun(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second order steps of the ODE; the last one is an Euler step, as in REPA and EDM.

    Costs 2 steps - 1 evaluations. Each evaluation is made, and guided, at its own time: REPA
    decides about the second one by the time of the first, which differs only where a guidance
    interval ends between the two.
    """
    dtype, x = x.dtype, x.double()
    final = len(times) - 2
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x.to(dtype), t)
        slope = v.double()
        if i < final:
            ahead = x + (t_next - t) * slope
            slope = (slope + velocity(ahead.to(dtype), t_next).double()) / 2
        x = x + (t_next - t) * slope
        if callback:
            callback(Step(i, t, t_next, x, v))
    return x


def adams(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Two-step Adams-Bashforth of the ODE: second order for one evaluation a step.

    The slope is drawn on from the last two velocities; the first step is an Euler step. At an equal
    number of evaluations the error is several times smaller than that of `heun`. Each velocity is
    guided at its own time, so a step behind an interval's end mixes both.
    """
    dtype, x = x.dtype, x.double()
    last: tuple[float, Tensor] | None = None
    for i, (t, t_next) in enumerate(pairwise(times)):
        v, dt = velocity(x.to(dtype), t), t_next - t
        slope = v.double()
        if last is not None:
            ratio = dt / (2 * last[0])
            slope = (1 + ratio) * slope - ratio * last[1]
        last = (dt, v.double())
        x = x + dt * slope
        if callback:
            callback(Step(i, t, t_next, x, v))
    return x


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler-Maruyama steps of the reverse SDE dx = (v - w s / 2) dt + sqrt(w) dW with w(t) = 2 t.

    s is the score. The last step takes the drift alone. REPA guides the drift, where we guide the
    velocity: the drift is affine in v and the weights (scale, 1 - scale) of guidance sum to one, so
    the two are the same.
    """
    dtype, x = x.dtype, x.double()
    noise = noise or (lambda step, like: torch.randn_like(like))
    final = len(times) - 2
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x.to(dtype), t)
        w, dt = 2 * t, t_next - t
        now = torch.tensor(t, dtype=torch.float64)
        score = score_from_velocity(v.double(), x, now, path=path)
        mean = x + dt * (v.double() - w / 2 * score)
        x = mean if i == final else mean + (w * -dt) ** 0.5 * noise(i, x).to(x)
        if callback:
            callback(Step(i, t, t_next, x, v))
    return x


class Times(Protocol):
    """What gives a solver's times; `erw.flow.shifted` where the solver can be asked for that."""

    def __call__(self, steps: int, *, shift: float = 1.0) -> list[float]: ...


class Solver(NamedTuple):
    """A named way to sample: the solver, its times, how often it evaluates the network (None: it
    decides, from sample to sample), and the objective that the network was trained for."""

    solve: Solve
    times: Times
    evaluations: Callable[[int], int] | None
    objective: Literal["flow", "ddpm"] = "flow"

    @property
    def adaptive(self) -> bool:
        """Whether it chooses its steps; it is then given one sample at a time."""
        return self.evaluations is None


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, uniform_times, lambda steps: steps),
    "heun": Solver(heun, uniform_times, lambda steps: 2 * steps - 1),
    "adams": Solver(adams, uniform_times, lambda steps: steps),
    "euler_maruyama": Solver(euler_maruyama, sde_times, lambda steps: steps),
    "dopri5": Solver(dopri5, whole_interval, None),
    "ddpm": Solver(ddpm, chain_times, lambda steps: steps, "ddpm"),
    "ddim": Solver(ddim, chain_times, lambda steps: steps, "ddpm"),
}
