"""One step of learning, `(net, batch, phase, draws) -> Losses`: replace this, not the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erw import ddpm, flow
from erw.data.cache import Batch
from erw.plan import Phase
from erw.rng import Draws


class Losses(NamedTuple):
    """Float32 scalars: what is minimised, and its two parts unweighted (0 where not computed).

    `flow` is the objective's own loss, whatever the objective; where a class token is denoised too,
    that of the latents alone, which compares with a model without one. The token's weighted loss is
    in the total.
    """

    total: Tensor
    flow: Tensor
    align: Tensor


Step = Callable[[nn.Module, Batch, Phase, Draws], Losses]
Token = Literal["none", "denoised", "given", "made"]


@dataclass(frozen=True)
class FlowMatching:
    """Flow matching with alignment (ERW Eq. 14); warm-up (Eq. 40) is the same step, weighted so.

    Attributes:
        null_class: label of an image whose class is not told.
        class_dropout: share of labels replaced by the null class.
        path, times, shift, prediction: see `erw.flow`.
        direction: weight of `flow.direction_loss` beside the squared error.
        token: what the teacher's class token is to the network: nothing; denoised beside the
            latents, with the same times and, if it is as wide as the patches' features, first among
            the targets of alignment (REG, arXiv 2507.01467); given in place of the class (RCG,
            arXiv 2312.03701); or all that is made.
        token_weight: of its loss, where it is denoised.
    """

    null_class: int
    class_dropout: float = 0.1
    path: flow.Path = flow.LINEAR
    times: flow.Times = "uniform"
    shift: float = 1.0
    prediction: flow.Prediction = "velocity"
    direction: float = 0.0
    token: Token = "none"
    token_weight: float = 0.03

    def __call__(self, net: nn.Module, batch: Batch, phase: Phase, draws: Draws) -> Losses:
        """Losses of `net`, an `erw.Aligned`, on this process's rows of the step's batch."""
        x = self.clean(batch, draws)
        if phase.clean:
            noised = flow.Noised(x, torch.zeros(len(x), device=x.device), x, x)
        else:
            u, normal = draws.uniform("time"), draws.normal("time")
            t = flow.sample_times(u, normal, times=self.times, path=self.path, shift=self.shift)
            noised = flow.noise(x, draws.normal("noise", *x.shape[1:]), t, path=self.path)

        y = self.condition(batch, phase, draws)
        targets = self.targets(batch) if phase.align_weight else None
        out, align = net(noised.x_t, noised.t, y, targets=targets, at=phase.at, stop=phase.stop)

        flow_loss = token_loss = None
        if out is not None and phase.flow_weight:
            off = flow.residual(self.prediction, out.float(), x, noised, path=self.path)
            if self.token == "denoised":
                off, of_token = off.tensor_split([batch.mean[0].numel()], 1)
                token_loss = self.token_weight * of_token.pow(2).mean()
            flow_loss = off.pow(2).mean()
            if self.direction:
                flow_loss += self.direction * flow.direction_loss(out.float(), noised.velocity)
        return weighed(phase, flow_loss, align, like=x, beside=token_loss)

    def clean(self, batch: Batch, draws: Draws) -> Tensor:
        """What is noised: latents, with or without the class token, or the token alone."""
        if self.token == "made":
            return standardised(batch)
        x = latents(batch, draws)
        if self.token == "denoised":
            assert batch.token is not None
            x = torch.cat([x.flatten(1), batch.token], 1)
        return x

    def condition(self, batch: Batch, phase: Phase, draws: Draws) -> Tensor:
        """Labels (B,), or representations (B, R) with zeros where they are dropped."""
        if self.token != "given":
            return labels(batch, phase, draws, null=self.null_class, dropout=self.class_dropout)
        hidden = draws.uniform("label") < (1.0 if phase.unlabelled else self.class_dropout)
        return torch.where(hidden[:, None], 0.0, standardised(batch))

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """What hidden tokens are aligned with: patch features, after the class token where that is
        a hidden token too and has their width, as in REG."""
        token = batch.token if self.token == "denoised" else None
        return tuple(
            torch.cat([token[:, None], z], 1)
            if token is not None and token.shape[1] == z.shape[2]
            else z
            for z in batch.features
        )


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
            x_s = ddpm.noised(chain, x, eps, step)

        y = labels(batch, phase, draws, null=self.null_class, dropout=self.class_dropout)
        targets = batch.features if phase.align_weight else None
        out, align = net(x_s, step, y, targets=targets, at=phase.at, stop=phase.stop)

        loss = None
        if out is not None and phase.flow_weight:
            loss = ddpm.hybrid_terms(chain, out.float(), x, eps, step).loss.mean()
        return weighed(phase, loss, align, like=x)


def latents(batch: Batch, draws: Draws) -> Tensor:
    """Latents (B, C, h, w) drawn from the VAE's moments."""
    return batch.mean + batch.std * draws.normal("latent", *batch.mean.shape[1:])


def labels(batch: Batch, phase: Phase, draws: Draws, *, null: int, dropout: float) -> Tensor:
    """Labels (B,), some or (as the phase says) all of them replaced by the null class, the only one
    of an unconditional model."""
    hidden = draws.uniform("label") < (1.0 if phase.unlabelled or not null else dropout)
    return torch.where(hidden, null, batch.labels)


def standardised(batch: Batch) -> Tensor:
    """Class tokens (B, R) with mean 0 and deviation 1 over the channels of each, as in RCG."""
    assert batch.token is not None
    return F.layer_norm(batch.token, batch.token.shape[1:])


def weighed(
    phase: Phase,
    flow: Tensor | None,
    align: Tensor | None,
    *,
    like: Tensor,
    beside: Tensor | None = None,
) -> Losses:
    """The losses that were computed, weighed as the phase says; `beside` goes with the flow's."""
    zero = torch.zeros((), device=like.device)
    flow, align = zero if flow is None else flow, zero if align is None else align
    whole = flow if beside is None else flow + beside
    return Losses(phase.flow_weight * whole + phase.align_weight * align, flow, align)


@cache
def _chain(device: torch.device | str) -> ddpm.Chain:
    """DiT's chain, its tables on the device."""
    with torch.device(device):
        return ddpm.chain()
