"""One step of learning, `(net, batch, phase, draws) -> Losses`: replace this, not the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erw import flow
from erw.data.cache import Batch
from erw.draws import Draws
from erw.plan import Phase


class Losses(NamedTuple):
    """Float32 scalars: what is minimised, and its two parts unweighted (0 where not computed)."""

    total: Tensor
    flow: Tensor
    align: Tensor


Step = Callable[[nn.Module, Batch, Phase, Draws], Losses]


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching with alignment (ERW Eq. 14); warm-up (Eq. 40) is the same step, weighted so.

    Attributes:
        null_class: label of an image whose class is not told.
        class_dropout: share of labels replaced by the null class.
        path, times, prediction: see `erw.flow`.
    """

    null_class: int
    class_dropout: float = 0.1
    path: flow.Path = flow.LINEAR
    times: flow.Times = "uniform"
    prediction: flow.Prediction = "velocity"

    def __call__(self, net: nn.Module, batch: Batch, phase: Phase, draws: Draws) -> Losses:
        """Losses of `net`, an `erw.Aligned`, on this process's rows of the step's batch."""
        shape = batch.mean.shape[1:]
        x = batch.mean + batch.std * draws.normal("latent", *shape)
        hidden = draws.uniform("label") < (1.0 if phase.unlabelled else self.class_dropout)
        y = torch.where(hidden, self.null_class, batch.labels)
        if phase.clean:
            noised = flow.Noised(x, torch.zeros(len(x), device=x.device), x, x)
        else:
            u, normal = draws.uniform("time"), draws.normal("time")
            t = flow.sample_times(u, normal, times=self.times, path=self.path)
            noised = flow.noise(x, draws.normal("noise", *shape), t, path=self.path)

        targets = batch.features if phase.align_weight else None
        out, align = net(noised.x_t, noised.t, y, targets=targets, at=phase.at, stop=phase.stop)

        zero = torch.zeros((), device=x.device)
        flow_loss = zero
        if out is not None and phase.flow_weight:
            wanted = flow.target(x, noised, self.prediction)
            flow_loss = (out.float() - wanted).pow(2).mean()
        align_loss = zero if align is None else align
        total = phase.flow_weight * flow_loss + phase.align_weight * align_loss
        return Losses(total, flow_loss, align_loss)
