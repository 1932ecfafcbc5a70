"""What every solver shares: its signature, and what it tells of each step.

`solver(velocity, x, times, *, path, noise, callback) -> x`:

| argument   | meaning                                                                            |
| velocity   | `(x (B, ...), t) -> v (B, ...)`; t is one Python float, the batch's time           |
| x          | the state at `times[0]`; its dtype is what the velocity is called with             |
| times      | falling times from 1 to 0, from the solver's own entry in `SOLVERS`                |
| noise      | `(step, x) -> standard normal numbers as x`; asked only by the SDE and by DDPM     |
| callback   | is given a `Step` after each step: progress, previews and tests hang here          |

The state is float64 and is returned as float64: it costs nothing beside the network, and 250 steps
then add no rounding of their own. Guidance wraps the velocity (`guidance.guided`), never the
solver. Of a DiT the solver asks noise and variance (B, 2C, ...) in place of the velocity.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from erw.flow import LINEAR, Path

Velocity = Callable[[Tensor, float], Tensor]
Noise = Callable[[int, Tensor], Tensor]


class Step(NamedTuple):
    """One finished step: its number from 0, its two times, the state reached, the velocity at t (of
    a DiT the noise)."""

    number: int
    t: float
    t_next: float
    x: Tensor
    velocity: Tensor


Callback = Callable[[Step], None]


class Solve(Protocol):
    """The signature that all solvers share."""

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        times: Sequence[float],
        *,
        path: Path = LINEAR,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor: ...
