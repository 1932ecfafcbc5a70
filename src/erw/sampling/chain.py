"""Down DiT's chain of noising steps: `ddpm` and `ddim` with the signature of all solvers.

Step s of the 1,000 is at t = (s + 1) / 1000, and t = 0 is clean data.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from erw import ddpm as chain_maths
from erw.errors import ConfigError
from erw.flow import LINEAR, Path
from erw.sampling.steps import Callback, Noise, Step, Velocity


def chain_times(steps: int, *, shift: float = 1.0) -> list[float]:
    """The times of `steps` of the 1,000 steps of DiT's chain, evenly spaced, then 0.

    Raises ConfigError unless `steps` is within 2..1000, and for a shift: the chain has its times.
    """
    if shift != 1:
        raise ConfigError(f"shift = {shift}: the times of DiT's chain cannot be shifted")
    told = chain_maths.respaced(chain_maths.chain(), steps).told.tolist()
    return [*((step + 1) / 1000 for step in reversed(told)), 0.0]


def ddpm(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DiT's ancestral sampling with its learned variance, at `chain_times`; one evaluation a step,
    the last one without noise."""
    return _down(chain_maths.ddpm, velocity, x, times, noise, callback)


def ddim(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path = LINEAR,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM without noise (eta = 0) of a DiT, at `chain_times`; one evaluation a step."""
    return _down(chain_maths.ddim, velocity, x, times, noise, callback)


def _down(
    sample: Callable[..., Tensor],
    network: Velocity,
    x: Tensor,
    times: Sequence[float],
    noise: Noise | None,
    callback: Callback | None,
) -> Tensor:
    """Down the chain that has these times, by one of the samplers of `erw.ddpm`."""
    at = chain_maths.respaced(chain_maths.chain(), len(times) - 1)
    asked, output = iter(times), x

    def ask(x_s: Tensor, _told: Tensor) -> Tensor:
        nonlocal output
        output = network(x_s, next(asked))
        return output

    def reached(i: int, x_s: Tensor) -> None:
        if callback:
            callback(Step(i, times[i], times[i + 1], x_s, output[:, : x.shape[1]]))

    return sample(ask, x, at, noise=noise, callback=reached)
