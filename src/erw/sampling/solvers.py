"""Solvers carry noise (t = 1) to data (t = 0) along a velocity field.

A solver is the rule of one step; the loop round it is `Solver.__call__`. `SOLVERS` names them, and
a solver of your own is one more entry:

    def midpoint(x, at):
        v, half = at.velocity(x, at.t), (at.t_next - at.t) / 2
        return x + 2 * half * at.velocity(x + half * v, at.t + half), v

    SOLVERS["midpoint"] = Solver(midpoint, evaluations=lambda steps: 2 * steps)

Sources: REPA (arXiv 2410.06940), section 2 and its samplers; SiT (arXiv 2401.08740), section 2.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erw import ddpm
from erw.errors import ConfigError, NumericsError, nearest
from erw.flow import LINEAR, Path, score_from_velocity, shifted

Velocity = Callable[[Tensor, float], Tensor]
"""(x (B, ...), t) -> v (B, ...); a DiT gives noise and variance (B, 2C, ...) instead."""


class At(NamedTuple):
    """Where a step starts and what its rule may use."""

    total: int  # of all steps
    left: int  # after this one
    t: float
    t_next: float
    velocity: Velocity  # float64 in and out; the network runs in the dtype of the initial state
    noise: Callable[[Tensor], Tensor]  # x -> standard normal numbers shaped like x
    path: Path
    previous: tuple[float, Tensor] | None  # time and velocity (a DiT's output) of the step before


def uniform_times(steps: int, *, shift: float = 1.0) -> list[float]:
    """`steps + 1` evenly spaced times from 1 to 0, then `erw.flow.shifted`."""
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()


def sde_times(steps: int, *, last: float = 0.04, shift: float = 1.0) -> list[float]:
    """`steps` evenly spaced times from 1 to `last`, then 0: the last step is long and noiseless."""
    if steps < 2:
        raise ConfigError(f"steps is {steps}; the SDE needs 2 or more")
    end = shifted(torch.tensor(last, dtype=torch.float64), 1 / shift)
    even = torch.linspace(1, float(end), steps, dtype=torch.float64)
    return [*shifted(even, shift).tolist(), 0.0]


def chain_times(steps: int, *, shift: float = 1.0) -> list[float]:
    """The times (s + 1) / 1000 of `steps` evenly spaced steps s of DiT's chain of 1,000, then 0."""
    if shift != 1:
        raise ConfigError(f"shift is {shift}; DiT's chain has times of its own")
    return [*((step + 1) / 1000 for step in reversed(_chain(steps).timesteps.tolist())), 0.0]


@dataclass(frozen=True)
class Solver:
    """A rule with the times that it is used at, called as `solver(velocity, x, times)`."""

    rule: Callable[..., tuple[Tensor, Tensor]]
    """(x, at, **options) -> the next state and the velocity at (x, at.t); all float64."""
    times: Callable[..., list[float]] = uniform_times  # (steps, *, shift) -> from 1 to 0
    evaluations: Callable[[int], int] | None = lambda steps: steps
    """Steps -> evaluations of the network; None: the rule decides, for one sample at a time."""
    objective: Literal["flow", "ddpm"] = "flow"  # of the models that it samples

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        times: Sequence[float],
        *,
        path: Path = LINEAR,
        noise: Callable[[int, Tensor], Tensor] | None = None,
        **options: float,
    ) -> Tensor:
        """Carry x (B, ...) from times[0] to times[-1] in float64; the velocity gets x's dtype.

        `noise`: (step number, x) -> standard normal numbers as x; `options` of the rule: `atol`
        and `rtol` of dopri5, `eta` of ddim.
        """
        dtype, x, previous = x.dtype, x.double(), None
        noise = noise or (lambda number, like: torch.randn_like(like))
        field: Velocity = lambda x, t: velocity(x.to(dtype), t).double()  # noqa: E731
        total = len(times) - 1
        for i, (t, t_next) in enumerate(pairwise(times)):
            at = At(total, total - 1 - i, t, t_next, field, partial(noise, i), path, previous)
            x, v = self.rule(x, at, **options)
            previous = t, v
        return x


def _euler(x: Tensor, at: At) -> tuple[Tensor, Tensor]:
    v = at.velocity(x, at.t)
    return x + (at.t_next - at.t) * v, v


def _heun(x: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Heun's second order step; the last one is an Euler step, as in REPA and EDM."""
    ahead, v = _euler(x, at)
    if not at.left:
        return ahead, v
    slope = (v + at.velocity(ahead, at.t_next)) / 2
    return x + (at.t_next - at.t) * slope, v


def _adams(x: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """Two-step Adams-Bashforth: second order for one evaluation a step; the first is Euler's."""
    v, dt = at.velocity(x, at.t), at.t_next - at.t
    if at.previous is None:
        return x + dt * v, v
    t_before, v_before = at.previous
    ratio = dt / (2 * (at.t - t_before))
    return x + dt * ((1 + ratio) * v - ratio * v_before), v


def _euler_maruyama(x: Tensor, at: At) -> tuple[Tensor, Tensor]:
    """dx = (v - w s / 2) dt + sqrt(w) dW with w(t) = 2 t and the score s; last step without dW."""
    v, w, dt = at.velocity(x, at.t), 2 * at.t, at.t_next - at.t
    score = score_from_velocity(v, x, torch.tensor(at.t, dtype=torch.float64), path=at.path)
    mean = x + dt * (v - w / 2 * score)
    return mean + (w * -dt) ** 0.5 * at.noise(x).to(x) if at.left else mean, v


def _dopri5(x: Tensor, at: At, *, atol: float = 1e-6, rtol: float = 1e-3) -> tuple[Tensor, Tensor]:
    """The first interval by Dormand and Prince's orders 5 and 4 with SiT's tolerances, those after
    it by Euler steps."""
    if at.previous:
        return _euler(x, at)
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ConfigError("dopri5 needs torchdiffeq: pip install 'erw[ode]'") from error
    slopes: list[Tensor] = []

    def slope(t: Tensor, x: Tensor) -> Tensor:
        v = at.velocity(x, float(t))
        slopes[:] = slopes or [v]
        return v

    span = torch.tensor([at.t, at.t_next], dtype=torch.float64, device=x.device)
    steps = {"step_t": span[1:]}  # it ends at t_next: the last step does not overshoot
    try:
        ends = odeint(slope, x, span, method="dopri5", atol=atol, rtol=rtol, options=steps)
    except AssertionError as error:
        raise NumericsError(f"dopri5 found no step small enough ({error})") from error
    return ends[-1], slopes[0]


def _chained(
    reverse: Callable[..., tuple[Tensor, Tensor]], x: Tensor, at: At, **options: float
) -> tuple[Tensor, Tensor]:
    """One step down DiT's chain, respaced to `at.total` steps, by a function of `erw.ddpm`."""
    output, step = at.velocity(x, at.t), torch.full((len(x),), at.left, device=x.device)
    mean, deviation = reverse(_chain(at.total), output, x, step, **options)
    if at.left and bool(deviation.any()):
        mean = mean + deviation * at.noise(x).to(x)
    return mean, output


@cache
def _chain(steps: int) -> ddpm.Chain:
    return ddpm.respaced(ddpm.chain(), steps)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(_euler),
    "heun": Solver(_heun, evaluations=lambda steps: 2 * steps - 1),
    "adams": Solver(_adams),
    "euler_maruyama": Solver(_euler_maruyama, sde_times),
    "dopri5": Solver(_dopri5, evaluations=None),
    "ddpm": Solver(partial(_chained, ddpm.ancestral_step), chain_times, objective="ddpm"),
    "ddim": Solver(partial(_chained, ddpm.ddim_step), chain_times, objective="ddpm"),
}


def solver_for(name: str, objective: str) -> Solver:
    """The solver. Raises ConfigError for an unknown one, or one of another objective."""
    if name not in SOLVERS:
        raise ConfigError(f"unknown solver {name!r}{nearest(name, SOLVERS)}")
    fit = [each for each, solver in SOLVERS.items() if solver.objective == objective]
    if name not in fit:
        raise ConfigError(f"solver {name} cannot draw flow.objective {objective}; choose {fit}")
    return SOLVERS[name]
