"""One step of learning, `(net, batch, phase, draws) -> Losses`: replace this, not the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erw import diffusion, flow
from erw.data.cache import Batch
from erw.draws import Draws
from erw.plan import Phase


class Losses(NamedTuple):
    """Float32 scalars: what is minimised, and its two parts unweighted (0 where not computed).

    `flow` is the objective's own loss, whatever the objective.
    """

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
        path, times, shift, prediction: see `erw.flow`.
        direction: weight of `flow.direction_loss` beside the squared error.
    """

    null_class: int
    class_dropout: float = 0.1
    path: flow.Path = flow.LINEAR
    times: flow.Times = "uniform"
    shift: float = 1.0
    prediction: flow.Prediction = "velocity"
    direction: float = 0.0

    def __call__(self, net: nn.Module, batch: Batch, phase: Phase, draws: Draws) -> Losses:
        """Losses of `net`, an `erw.Aligned`, on this process's rows of the step's batch."""
        x = latents(batch, draws)
        if phase.clean:
            noised = flow.Noised(x, torch.zeros(len(x), device=x.device), x, x)
        else:
            u, normal = draws.uniform("time"), draws.normal("time")
            t = flow.sample_times(u, normal, times=self.times, path=self.path, shift=self.shift)
            noised = flow.noise(x, draws.normal("noise", *x.shape[1:]), t, path=self.path)

        y = labels(batch, phase, draws, null=self.null_class, dropout=self.class_dropout)
        targets = batch.features if phase.align_weight else None
        out, align = net(noised.x_t, noised.t, y, targets=targets, at=phase.at, stop=phase.stop)

        flow_loss = None
        if out is not None and phase.flow_weight:
            off = flow.residual(self.prediction, out.float(), x, noised, path=self.path)
            flow_loss = off.pow(2).mean()
            if self.direction:
                flow_loss += self.direction * flow.direction_loss(out.float(), noised.velocity)
        return weighed(phase, flow_loss, align, like=x)


@dataclass(frozen=True)
class Diffusion:
    """DiT's objective in place of flow matching: squared error of the noise plus the variational
    bound that teaches the variance, at a step of the chain drawn for each image. Phases, alignment
    and draws are those of `FlowMatching`; a clean input is told to be at step 0, the least noisy.

    Attributes:
        null_class, class_dropout: as there.
    """

    null_class: int
    class_dropout: float = 0.1

    def __call__(self, net: nn.Module, batch: Batch, phase: Phase, draws: Draws) -> Losses:
        """Losses of `net`, an `erw.Aligned` that gives 2 C channels."""
        x, chain = latents(batch, draws), _chain(draws.device)
        eps = draws.normal("noise", *x.shape[1:])
        if phase.clean:
            step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            x_s = x
        else:
            step = (draws.uniform("time") * len(chain)).long()
            x_s = diffusion.noised(chain, x, eps, step)

        y = labels(batch, phase, draws, null=self.null_class, dropout=self.class_dropout)
        targets = batch.features if phase.align_weight else None
        out, align = net(x_s, step, y, targets=targets, at=phase.at, stop=phase.stop)

        loss = None
        if out is not None and phase.flow_weight:
            loss = diffusion.hybrid_terms(chain, out.float(), x, eps, step).loss.mean()
        return weighed(phase, loss, align, like=x)


def latents(batch: Batch, draws: Draws) -> Tensor:
    """Latents (B, C, h, w) drawn from the VAE's moments."""
    return batch.mean + batch.std * draws.normal("latent", *batch.mean.shape[1:])


def labels(batch: Batch, phase: Phase, draws: Draws, *, null: int, dropout: float) -> Tensor:
    """Labels (B,), some or (as the phase says) all of them replaced by the null class."""
    hidden = draws.uniform("label") < (1.0 if phase.unlabelled else dropout)
    return torch.where(hidden, null, batch.labels)


def weighed(phase: Phase, flow: Tensor | None, align: Tensor | None, *, like: Tensor) -> Losses:
    """The losses that were computed, weighed as the phase says."""
    zero = torch.zeros((), device=like.device)
    flow, align = zero if flow is None else flow, zero if align is None else align
    return Losses(phase.flow_weight * flow + phase.align_weight * align, flow, align)


@cache
def _chain(device: torch.device | str) -> diffusion.Chain:
    """DiT's chain, its tables on the device."""
    with torch.device(device):
        return diffusion.chain()
