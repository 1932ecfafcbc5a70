"""Objectives: `(net, batch, phase, rng, ema=) -> losses by name`. Replace this, not the loop.

The losses are float32 scalars without weights; `total` weighs them as the phase says. A loss that
the phase gives no weight is not computed and not among them.

| name      | loss                                                                        |
| flow      | squared error of the velocity (or x, noise, score) of the latents           |
| ddpm      | DiT's squared error of the noise and variational bound, in place of `flow`   |
| token     | squared error of the class token that is denoised along (REG)               |
| direction | 1 - cosine between predicted and true velocity (LightningDiT)               |
| internal  | as flow, of a second output after an earlier block (Internal Guidance)       |
| contrastive | squared error against another image's velocity, weighed below 0           |
| others    | alignment terms by their names in the plan                                  |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from erw import ddpm, flow
from erw.align import ALIGN_LOSSES, TARGET_NORMS, attention_logits, compare, gathered
from erw.config import Run
from erw.data.cache import Batch, Cache
from erw.data.statistics import Statistics
from erw.models import Backbone
from erw.plan import Align, Phase
from erw.rng import Draws
from erw.routing import Route, choose, index
from erw.training.network import Network, Prediction

Losses = dict[str, Tensor]
Token = Literal["none", "denoised", "given", "generated"]


class Objective(Protocol):
    """Losses on this process's rows of a step's batch; `ema` is called like the backbone."""

    def __call__(
        self, net: Network, batch: Batch, phase: Phase, rng: Draws, *, ema: Backbone | None = None
    ) -> Losses: ...


def total(losses: Losses, phase: Phase) -> Tensor:
    """The weighted sum that is minimised."""
    return torch.stack([phase.weights[name] * loss for name, loss in losses.items()]).sum()


@dataclass(frozen=True)
class Denoising:
    """What objectives share: a noised input, a condition, losses on the output, and alignment."""

    null_class: int  # label of an image whose class is withheld
    features: tuple[str, ...] = ()  # encoders in the order of `batch.features`
    class_dropout: float = 0.1  # share of labels replaced by the null class
    patches: int = 0  # of an image; for token routing
    # how the encoder's class token is used: `none`; `denoised` along with the latents at the same
    # times (REG, arXiv 2507.01467); `given` in place of the class (RCG, arXiv 2312.03701); or
    # `generated`, the only thing that is (RCG's RDM)
    token: Token = "none"
    # by encoder, of terms that standardise their targets over the images
    statistics: Mapping[str, Statistics] = field(default_factory=dict, kw_only=True)

    def __call__(
        self, net: Network, batch: Batch, phase: Phase, rng: Draws, *, ema: Backbone | None = None
    ) -> Losses:
        x = self.clean(batch, rng)
        noised = self.noised(x, phase, rng)
        y = self.condition(batch, phase, rng)
        route = self.route(phase, rng)
        prediction = net(noised.x_t, noised.t, y, phase=phase, **route)
        losses: Losses = {}
        if prediction.output is not None:
            losses = self.prediction_losses(prediction, x, noised, batch, phase)

        def averaged(term: Align) -> Tensor:
            assert ema is not None, "an objective with a term of target ema is called with ema="
            assert term.target_block is not None
            block, at = term.target_block, noised
            if term.earlier:
                at = self.earlier(x, noised, term.earlier * rng.uniform(f"earlier {term.name}"))
            with torch.no_grad():
                tapped = ema(at.x_t, at.t, y, tap=(block,), stop_at=block)
            assert not isinstance(tapped, Tensor)
            return tapped.hidden[block]

        kept = route["route"].kept if route else None
        return losses | self.alignment(prediction, batch, phase, rng, averaged, kept)

    def route(self, phase: Phase, rng: Draws) -> dict[str, Route]:
        """The backbone's `route`, drawn for each image; nothing where all blocks see all tokens."""
        r, p = phase.routing, phase.path_drop
        kept = choose(rng.uniform("routing", self.patches), r.keep, r.choose) if r else None
        dropped = p is not None and rng.uniform("path") < p
        route = Route(r.blocks if r else (0, 0), kept, dropped)
        return {"route": route} if r or p is not None else {}

    def noised(self, x: Tensor, phase: Phase, rng: Draws) -> flow.Noised:
        """The network's input: x at sampled times, or the clean x."""
        raise NotImplementedError

    def earlier(self, x: Tensor, noised: flow.Noised, by: Tensor) -> flow.Noised:
        """The same x with the same noise at times earlier by `by` (B,), not before t = 0."""
        raise NotImplementedError

    def prediction_losses(
        self, prediction: Prediction, x: Tensor, noised: flow.Noised, batch: Batch, phase: Phase
    ) -> Losses:
        """The losses on the network's output, those that the phase weighs."""
        raise NotImplementedError

    def clean(self, batch: Batch, rng: Draws) -> Tensor:
        """What is noised: latents, with or without the class token, or the token alone."""
        if self.token == "generated":
            return standardized_token(batch)
        x = batch.mean + batch.std * rng.normal("latent", *batch.mean.shape[1:])  # VAE's moments
        if self.token == "denoised":
            assert batch.token is not None
            x = torch.cat([x.flatten(1), batch.token], 1)
        return x

    def condition(self, batch: Batch, phase: Phase, rng: Draws) -> Tensor:
        """Labels (B,), or representations (B, R) with zeros where they are dropped."""
        given = self.token == "given"
        withheld = phase.unlabelled or not (self.null_class or given)
        dropped = rng.uniform("label") < (1.0 if withheld else self.class_dropout)
        if not given:
            return torch.where(dropped, self.null_class, batch.labels)
        return torch.where(dropped[:, None], 0.0, standardized_token(batch))

    def alignment(
        self, prediction: Prediction, batch: Batch, phase: Phase, rng: Draws,
        averaged: Callable[[Align], Tensor], kept: Tensor | None = None,
    ) -> Losses:  # fmt: skip
        """The loss of each active alignment term; of several encoders in one term the mean."""
        losses: Losses = {}
        for term in phase.terms:
            projected, loss = prediction.projected[term.name], ALIGN_LOSSES[term.loss]
            if term.temperature is not None:
                loss = partial(loss, temperature=term.temperature)
            values = []
            targets = self.targets(term, prediction, batch, averaged)
            for h, z in zip(projected, targets, strict=True):
                if term.attends:
                    z = attention_logits(z, term.heads)
                    both = min(h.shape[1], z.shape[1])
                    h, z = h[:, :both], z[:, :both]
                z = TARGET_NORMS[term.normalize](z)
                if kept is not None and h.shape[1] < z.shape[1]:  # of a routed block
                    z = z.gather(1, index(z, kept, self.patches))
                elif kept is not None and h.shape[1] > z.shape[1]:
                    h = h.gather(1, index(h, kept, self.patches))
                if term.tokens < 1:  # those with the smallest of uniform numbers
                    u = rng.uniform(f"tokens {term.name}", h.shape[1])
                    at = u.argsort(dim=1)[:, : max(1, round(term.tokens * h.shape[1])), None]
                    h, z = (x.gather(1, at.expand(-1, -1, x.shape[2])) for x in (h, z))
                values.append(compare(loss, h, z))
            losses[term.name] = torch.stack(values).mean()
        return losses

    def targets(
        self, term: Align, prediction: Prediction, batch: Batch, averaged: Callable[[Align], Tensor]
    ) -> tuple[Tensor, ...]:
        """A term's targets (B, T, F), in the order of its projections.

        A class token that is denoised precedes the patches; so it does in targets of its width.
        """
        if term.reads_encoder:
            features = dict(zip(self.features, batch.features, strict=True))
            names = term.encoders(features)
            if term.normalize == "images" and not batch.mean.is_meta:
                features = {k: self.statistics[k].standardized(features[k]) for k in names}
            targets = tuple(features[name] for name in names)
            if self.token != "denoised" or (token := batch.token) is None:
                return targets
            return tuple(
                torch.cat([token[:, None], z], 1) if token.shape[1] == z.shape[2] else z
                for z in targets
            )
        if term.target == "none":
            return prediction.projected[term.name]
        if term.target == "ema":
            return (averaged(term),)
        assert term.target_block is not None
        return (prediction.hidden[term.target_block].detach(),)


@dataclass(frozen=True)
class FlowMatching(Denoising):
    """Flow matching with alignment (ERW Eq. 14); warm-up (Eq. 40) is the same with other weights.

    Attributes: see `erw.flow`. A clean input has t = 0.
    """

    path: flow.Path = flow.LINEAR
    times: flow.Times = "uniform"
    shift: float = 1.0
    prediction: flow.Prediction = "velocity"

    def noised(self, x: Tensor, phase: Phase, rng: Draws) -> flow.Noised:
        if phase.clean:
            return flow.Noised(x, torch.zeros(len(x), device=x.device), x, x)
        u, normal = rng.uniform("time"), rng.normal("time")
        t = flow.sample_times(u, normal, times=self.times, path=self.path, shift=self.shift)
        return flow.noise(x, rng.normal("noise", *x.shape[1:]), t, path=self.path)

    def earlier(self, x: Tensor, noised: flow.Noised, by: Tensor) -> flow.Noised:
        return flow.noise(x, noised.noise, (noised.t - by).clamp(min=0), path=self.path)

    def prediction_losses(
        self, prediction: Prediction, x: Tensor, noised: flow.Noised, batch: Batch, phase: Phase
    ) -> Losses:
        losses: Losses = {}
        assert prediction.output is not None
        output = prediction.output.float()
        residual = partial(flow.residual, self.prediction, path=self.path)
        if "flow" in phase.weights:
            error = residual(output, x, noised)
            if self.token == "denoised":
                error, of_token = error.tensor_split([batch.mean[0].numel()], 1)
                losses["token"] = of_token.pow(2).mean()
            losses["flow"] = error.pow(2).mean()
            if "direction" in phase.weights:
                losses["direction"] = flow.direction_loss(output, noised.velocity)
            if prediction.internal is not None:
                losses["internal"] = residual(prediction.internal.float(), x, noised).pow(2).mean()
            if "contrastive" in phase.weights:
                rows, first = gathered(noised.velocity)
                others = rows.roll(-1, 0)[first : first + len(x)]
                losses["contrastive"] = (output - others).pow(2).mean()
        return losses


@dataclass(frozen=True)
class Diffusion(Denoising):
    """DiT's objective: squared error of the noise plus the variational bound that teaches the
    variance, at a random step of the chain for each image. A clean input has step 0, the least
    noisy.
    """

    def noised(self, x: Tensor, phase: Phase, rng: Draws) -> flow.Noised:
        eps, chain = rng.normal("noise", *x.shape[1:]), _chain(rng.device)
        if phase.clean:
            return flow.Noised(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), eps, eps)
        step = (rng.uniform("time") * len(chain.beta)).long()
        return flow.Noised(ddpm.noised(chain, x, eps, step), step, eps, eps)

    def earlier(self, x: Tensor, noised: flow.Noised, by: Tensor) -> flow.Noised:
        chain = _chain(x.device)
        step = (noised.t - (by * len(chain.beta)).round().long()).clamp(min=0)
        return noised._replace(x_t=ddpm.noised(chain, x, noised.noise, step), t=step)

    def prediction_losses(
        self, prediction: Prediction, x: Tensor, noised: flow.Noised, batch: Batch, phase: Phase
    ) -> Losses:
        if "ddpm" not in phase.weights or prediction.output is None:
            return {}
        output = prediction.output.float()
        terms = ddpm.hybrid_terms(_chain(x.device), output, x, noised.noise, noised.t)
        return {"ddpm": (terms.mse + terms.vb).mean()}


def standardized_token(batch: Batch) -> Tensor:
    """Class tokens (B, R) with mean 0 and deviation 1 over the channels of each, as in RCG."""
    assert batch.token is not None
    return F.layer_norm(batch.token, batch.token.shape[1:])


def build_objective(run: Run, cache: Cache | None = None) -> Objective:
    """The objective of a resolved run; `cache` is needed where targets are standardised by it."""
    assert run.model.num_classes is not None
    patches = ((run.model.input_size or 0) // run.model.patch) ** 2
    shared = run.model.num_classes, run.data.features, run.data.class_dropout, patches
    terms = [term for term in run.plan.active if term.normalize == "images" and cache]
    names = {name for term in terms for name in term.encoders(run.data.features)}
    statistics = {name: cast(Cache, cache).statistics(name) for name in names}
    if run.flow.objective == "ddpm":
        return Diffusion(*shared, statistics=statistics)
    token: Token = "generated" if run.model.net == "rdm" else run.model.class_token
    path, times = flow.PATHS[run.flow.path], run.flow.times
    return FlowMatching(
        *shared, token, path, times, run.flow.shift, run.flow.prediction, statistics=statistics
    )


@cache
def _chain(device: torch.device | str) -> ddpm.Chain:
    """DiT's chain, its tables on the device."""
    with torch.device("cpu"):
        chain = ddpm.chain()
    return ddpm.Chain(*(table.to(device) for table in chain))
