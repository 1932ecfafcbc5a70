"""All that trains: the backbone and its alignment terms' projectors, as the cache decides."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erw.align import PROJECTORS
from erw.config import Run
from erw.data.cache import Cache
from erw.errors import ConfigError
from erw.models import Backbone, build_model
from erw.models.sit import Tapped, grid_of
from erw.plan import Align, Phase
from erw.rng import seeded


class Prediction(NamedTuple):
    """The backbone's output (None after an early stop), hidden tokens by depth, each active term's
    projected tokens, one (B, T, F) per target, or attention, and the backbone's internal output."""

    output: Tensor | None
    hidden: dict[int, Tensor]
    projected: dict[str, tuple[Tensor, ...]]
    internal: Tensor | None = None


class Network(nn.Module):
    """A backbone with one projector for each target of each alignment term.

    The projections are part of the forward so that DistributedDataParallel averages their
    gradients too.

    Args:
        model: the backbone.
        dims: term name -> channels of its targets; of `block`, `ema` and `none` the model's width.
        terms: the alignment terms.
        hidden: width of the projectors' hidden layers.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        terms: tuple[Align, ...] = (),
        dims: Mapping[str, tuple[int, ...]] | None = None,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        self.model = model
        dims = dims or {}
        pairs = [(term, dim) for term in terms for dim in dims[term.name]]
        self.projectors = nn.ModuleList(
            PROJECTORS[term.projector](model.width, hidden, dim) for term, dim in pairs
        )
        # A class token precedes the patches. It is aligned where its width is the target's (REG).
        self._skip = [int(0 < model.class_token != dim) for _, dim in pairs]
        self._heads = {
            term.name: [i for i, (other, _) in enumerate(pairs) if other is term] for term in terms
        }

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, phase: Phase, **route: Any) -> Prediction:
        """x (B, *latent_shape), t (B,), y (B,) labels or (B, R); `route` as in `Backbone`."""
        options: dict[str, Any] = {"tap": phase.taps, "attention": phase.attention}
        options |= {"stop_at": phase.stop_at, "internal": "internal" in phase.weights}
        options |= {"unrotated": phase.unrotated}
        options = {key: value for key, value in options.items() if value}
        output = self.model(x, t, y, **options, **route)
        if isinstance(output, Tensor):
            return Prediction(output, {}, {})
        projected = {
            term.name: tuple(
                self._projection(i, output, phase, term) for i in self._heads[term.name]
            )
            for term in phase.terms
        }
        return Prediction(output.velocity, output.hidden, projected, output.internal)

    def _projection(self, i: int, tapped: Tapped, phase: Phase, term: Align) -> Tensor:
        """What projector `i`, one of the term's, makes of its block; of attention its logits."""
        skip, block = self._skip[i], phase.block(term)
        if term.attends:
            q, k = (x[:, :, skip:] for x in tapped.attention[block])
            return q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        return self.projectors[i](tapped.hidden[block][:, skip:])

    def train_only(self, phase: Phase) -> None:
        """Require gradients of what the phase trains, and of nothing else."""
        self.requires_grad_(phase.stop_at is None)
        if phase.stop_at is not None:
            for module in self.model.warmup_modules(phase.stop_at):
                module.requires_grad_(True)
            before, none = (self.model.warmup_modules(n) for n in (phase.first - 1, 0))
            for module in {*before} - {*none}:
                module.requires_grad_(False)
        self.projectors.requires_grad_(False)
        for term in phase.terms:
            for i in self._heads[term.name]:
                self.projectors[i].requires_grad_(True)


def build_network(run: Run, dims: Mapping[str, int]) -> Network:
    """The network of a resolved run; `dims`: channels of each encoder's features.

    Backbone and projectors are seeded apart, so that methods start from the same backbone.
    """
    model, terms = build_model(run.model, outputs=run.flow.outputs, seed=run.seed), run.plan.active
    encoders = {term.name: term.encoders(run.data.features) for term in terms}
    widths = {k: tuple(dims[v] for v in names) or (model.width,) for k, names in encoders.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(run.seed, "projector"))
        return Network(model, terms=terms, dims=widths, hidden=run.model.projector)


def fresh_projectors(run: Run, dims: Mapping[str, int]) -> nn.ModuleList:
    """Projectors that start phase 2 anew: the same shapes, another seed."""
    return build_network(run.replace(seed=seeded(run.seed, "phase 2")), dims).projectors


def resolve(run: Run, cache: Cache) -> Run:
    """The run with everything filled in that the cache decides: latent shape, classes, features.

    Raises ConfigError or CacheError where settings and cache do not fit each other.
    """
    channels, size, _ = cache.latent_shape
    token = token_encoder(run, cache) if run.model.needs_token else ""
    unlabelled = run.model.num_classes == 0 or run.model.class_token == "given"
    decided: dict[str, Any] = {
        "input_size": size,
        "channels": channels,
        "num_classes": 0 if unlabelled else cache.num_classes,
        "class_dim": cache.features[token].class_dim if token else None,
    }
    for name, value in decided.items():
        if (setting := getattr(run.model, name)) not in (None, value):
            problem = f"model.{name} is {setting}, but the cache {cache.address} has {value}"
            raise ConfigError(f"{problem}; leave it out to take the cache's")
    features = _features(run, cache, token)
    model = dataclasses.replace(run.model, **decided)
    if model.net != "rdm":
        cache.require(encoders=features, tokens=grid_of(size, model.patch) ** 2)
    data = dataclasses.replace(run.data, features=features, class_token=token or None)
    return run.replace(model=model, data=data)


def _features(run: Run, cache: Cache, token: str) -> tuple[str, ...]:
    """The encoders whose features the plan's terms read."""
    encoders = [term.encoder for term in run.plan.active if term.reads_encoder]
    if not encoders:
        return ()
    if not (run.data.features or cache.features):
        raise ConfigError(
            f"the plan aligns, but {cache.address} has no features: prepare --encoders"
        )
    denoised = run.model.class_token == "denoised"
    named = dict.fromkeys(name for name in encoders if name)
    others = () if all(encoders) else Align().encoders(cache.features)
    default = (token,) if denoised else tuple(dict.fromkeys((*others, *named)))
    features = run.data.features or default
    if denoised and features != (token,):
        raise ConfigError(f"data.features is {', '.join(features)}, but REG's token is of {token}")
    if missing := [name for name in named if name not in features]:
        raise ConfigError(f"plan.align has target encoder:{missing[0]}: add it to data.features")
    return features


def token_encoder(run: Run, cache: Cache) -> str:
    """The encoder whose class token the run reads. Raises as `resolve`."""
    names = [name for name, spec in cache.features.items() if spec.class_dim]
    if len(names) > 1 and not run.data.class_token:
        problem = f"the cache {cache.address} has class tokens of {', '.join(names)}"
        raise ConfigError(f"{problem}; choose one with --data.class_token")
    name = run.data.class_token or next(iter(names or cache.features), "dinov2-b")
    cache.require(token=name)
    return name
