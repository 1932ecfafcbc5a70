"""What a run has spent after a number of steps: a function of the plan, not of history."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from erw.models.cost import StepCost
from erw.plan import Plan


class Spent(NamedTuple):
    """Floating-point operations so far; `warmup` and `teacher` are parts of `total`."""

    total: int
    warmup: int
    teacher: int


@dataclass(frozen=True)
class Ledger:
    """The cost of a run by step.

    The teacher's features come from a cache, where each image is encoded once. Its cost is that of
    the distinct images that aligned steps have used (all steps, where the model needs the teacher's
    class token): it grows over the first epoch and then stands still. (Encoding online would cost
    `cost.teacher` for every image of every such step.)

    Attributes:
        plan, batch_size: decide how many images each phase has seen.
        cost: FLOPs per image, by part.
        rows: images in the cache.
    """

    plan: Plan
    batch_size: int
    cost: StepCost
    rows: int

    def images(self, step: int) -> int:
        """Images seen in the first `step` steps."""
        return self.plan.images(step, self.batch_size)

    def spent(self, step: int) -> Spent:
        """FLOPs of the first `step` steps."""
        warm = self.images(min(step, self.plan.warmup))
        full = self.images(step) - warm
        aligned = self.images(min(step, aligned_until(self.plan))) - warm
        taught = warm + (full if self.cost.always_taught else aligned)
        teacher = min(taught, self.rows) * self.cost.teacher
        warmup = warm * (self.cost.warmup + self.cost.projector)
        phase2 = full * self.cost.full + aligned * self.cost.projector
        return Spent(warmup + phase2 + teacher, warmup, teacher)

    def share(self, step: int, steps: int) -> float | None:
        """Part of the cost of `steps` that the first `step` have; None where no cost is known."""
        whole = self.spent(steps).total
        return self.spent(step).total / whole if whole else None

    def steps_for(self, flops: float) -> int:
        """The largest number of steps whose total cost is at most `flops`."""
        low, high = 0, 1
        while self.spent(high).total <= flops:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.spent(middle).total <= flops else (low, middle)
        return low


def aligned_until(plan: Plan) -> int:
    """The first step from which no alignment loss is computed any more."""
    align = plan.align
    if align.value == 0:
        return plan.warmup
    if align.kind in ("cosine", "linear", "stop_at"):
        return plan.warmup + align.over
    return math.trunc(2**62)
