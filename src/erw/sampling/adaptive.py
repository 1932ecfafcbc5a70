"""An ODE solver that chooses its own steps: Dormand and Prince's pair of orders 5 and 4.

torchdiffeq has one step size for all that it integrates, chosen by a norm over the whole state, so
a sample would depend on its batch. Therefore samples are drawn one at a time (`Solver.adaptive`):
each has its own steps and its own number of evaluations.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from erw.errors import ConfigError, NumericsError
from erw.flow import LINEAR, Path
from erw.sampling.steps import Callback, Noise, Step, Velocity


def whole_interval(steps: int, *, shift: float = 1.0) -> list[float]:
    """The times of an adaptive solver, which needs no number of steps.

    Raises ConfigError for a shift, which would be without effect.
    """
    if shift != 1:
        raise ConfigError(f"shift = {shift}: a solver that chooses its steps has no times to shift")
    return [1.0, 0.0]


def dopri5(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> Tensor:
    """From times[0] to times[1] with steps whose estimated error stays within atol + rtol |x|; then
    Euler steps to the times behind, if there are any. To a callback all of it is one step.

    The root mean square over all of `x` decides, so give one sample. Tolerances are those of SiT's
    released sampler, whose last step overshoots the end and is interpolated; ours ends there, so
    that the network is not asked beyond it.

    Raises:
        ConfigError: torchdiffeq is not installed.
        NumericsError: no step is small enough, because the velocity is not finite or not smooth.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ConfigError("dopri5 needs torchdiffeq: pip install 'erw[ode]'") from error
    first: list[Tensor] = []
    dtype = x.dtype

    def slope(t: Tensor, state: Tensor) -> Tensor:
        v = velocity(state.to(dtype), float(t))
        first[:] = first or [v]
        return v.double()

    span = torch.tensor(times[:2], dtype=torch.float64, device=x.device)
    try:
        x = odeint(
            slope, x.double(), span, method="dopri5", atol=atol, rtol=rtol,
            options={"step_t": span[1:]},
        )[-1]  # fmt: skip
    except AssertionError as error:
        raise NumericsError(
            f"dopri5 found no step small enough ({error}); is the velocity finite?"
        ) from error
    for t, t_next in pairwise(times[1:]):
        x = x + (t_next - t) * velocity(x.to(dtype), t).double()
    if callback:
        callback(Step(0, times[0], times[-1], x, first[0]))
    return x
