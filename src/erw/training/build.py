"""From settings and a cache to the network that is trained, and what it will cost."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from erw import flow
from erw.align import Aligned, AlignLoss, cosine, nt_xent
from erw.config import Model, Run
from erw.data.cache import Cache
from erw.errors import ConfigError
from erw.models import SiT
from erw.models.cost import Flops, StepCost, rdm_flops, sit_flops, training_step_flops
from erw.models.rdm import Rdm
from erw.models.sit import grid_of
from erw.plan import Plan
from erw.rng import seeded
from erw.training.objective import Diffusion, FlowMatching, Step


def resolve(run: Run, cache: Cache) -> Run:
    """The run with everything filled in that the cache decides: latent shape, classes, features.

    Raises:
        ConfigError, CacheError: settings and cache do not fit each other.
    """
    channels, size, _ = cache.latent_shape
    token = token_encoder(run, cache) if run.model.needs_token else ""
    unlabelled = run.model.num_classes == 0 or run.model.class_token == "given"
    told: dict[str, Any] = {
        "input_size": size,
        "channels": channels,
        "num_classes": 0 if unlabelled else cache.num_classes,
        "class_dim": cache.features[token].class_dim if token else None,
    }
    for name, value in told.items():
        if getattr(run.model, name) not in (None, value):
            raise ConfigError(
                f"model.{name} is {getattr(run.model, name)}, but the cache {cache.where} has "
                f"{value}; leave it out to take the cache's"
            )
    features = run.data.features or tuple(cache.features)
    if run.model.class_token == "denoised":
        features = run.data.features or (token,)
        if run.plan.aligns and features != (token,):
            raise ConfigError(
                f"data.features is {', '.join(features)}, but the class token is of {token}, and "
                "REG aligns both with one encoder; leave it out, or train without alignment"
            )
    if run.plan.aligns and not features:
        raise ConfigError(
            f"the plan aligns with an encoder, but the cache {cache.where} holds no features; "
            "prepare it with --encoders, or train with the plan of SiT (--plan.align.value 0)"
        )
    if not run.plan.aligns:
        features = ()
    model = dataclasses.replace(run.model, **told)
    if model.net == "sit":
        cache.require(encoders=features, tokens=grid_of(size, model.patch) ** 2)
    data = dataclasses.replace(run.data, features=features, class_token=token or None)
    return run.replace(model=model, data=data)


def token_encoder(run: Run, cache: Cache) -> str:
    """The encoder whose class token the run reads.

    Raises:
        ConfigError: the cache has several and none is named, or is named wrongly.
        CacheError: the cache has none, or not that one.
    """
    if run.data.class_token:
        cache.require(token=run.data.class_token)
        return run.data.class_token
    held = [name for name, spec in cache.features.items() if spec.class_dim]
    if not held:
        cache.require(token=next(iter(cache.features), "dinov2-b"))
    if len(held) > 1:
        raise ConfigError(
            f"the cache {cache.where} has class tokens of {', '.join(held)}; choose one with "
            "--data.class_token"
        )
    return held[0]


def build_model(model: Model, *, outputs: int = 1, seed: int = 0) -> Any:
    """The network of resolved settings, a `SiT` or an `Rdm`, initialised as a function of `seed`.

    `outputs`: numbers given for each of the latent, as the run's `flow.outputs` says.
    """
    assert model.input_size and model.channels and model.num_classes is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, "init"))
        if model.net == "rdm":
            assert model.class_dim
            sizes = {name: getattr(model, name) for name in ("depth", "width", "num_classes")}
            return Rdm(dim=model.class_dim, **sizes)
        return SiT(
            input_size=model.input_size,
            channels=model.channels,
            patch=model.patch,
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            num_classes=model.num_classes,
            rope=model.rope,
            qk_norm=model.qk_norm,
            norm=model.norm,
            mlp=model.mlp,
            adaln_shift=model.adaln_shift,
            out_channels=outputs * model.channels,
            **token_sizes(model),
        )


def build_net(run: Run, cache: Cache) -> Aligned:
    """The transformer with one projector for each encoder aligned with."""
    net = build_model(run.model, outputs=run.flow.outputs, seed=run.seed)
    apart = run.model.class_token == "denoised" and not token_aligned(run, cache)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(run.seed, "projector"))
        return Aligned(
            net,
            at=run.plan.align_depth,
            width=run.model.width,
            dim=tuple(cache.features[name].dim for name in run.data.features),
            hidden=run.model.projector,
            loss=align_loss(run.plan),
            skip=int(apart),
        )


def fresh_projectors(run: Run, cache: Cache) -> nn.ModuleList:
    """Projectors that start phase 2 anew: the same shapes, another seed."""
    return build_net(run.replace(seed=seeded(run.seed, "phase 2")), cache).projectors


def align_loss(plan: Plan) -> AlignLoss:
    """The alignment loss that a plan names."""
    if plan.loss == "cosine":
        return cosine
    return partial(nt_xent, temperature=plan.temperature, negatives=plan.negatives)


def token_aligned(run: Run, cache: Cache) -> bool:
    """Whether the class token is among the targets, as in REG: if it is as wide as the patches'
    features, which one projector gives."""
    return all(cache.features[name].dim == run.model.class_dim for name in run.data.features)


def build_step(run: Run) -> Step:
    """The training step of resolved settings."""
    assert run.model.num_classes is not None
    if run.flow.objective == "ddpm":
        return Diffusion(null_class=run.model.num_classes, class_dropout=run.data.class_dropout)
    return FlowMatching(
        null_class=run.model.num_classes,
        class_dropout=run.data.class_dropout,
        path=flow.PATHS[run.flow.path],
        times=run.flow.times,
        shift=run.flow.shift,
        prediction=run.flow.prediction,
        direction=run.flow.direction,
        token="made" if run.model.net == "rdm" else run.model.class_token,
        token_weight=run.flow.token_weight,
    )


def step_cost(run: Run, cache: Cache) -> StepCost:
    """FLOPs per image of a resolved run's steps, by part."""
    used = dict.fromkeys((*run.data.features, *filter(None, [run.data.class_token])))
    dims = tuple(cache.features[name].dim for name in run.data.features)
    teacher = sum(cache.features[name].flops for name in used)
    return network_cost(run, dims=dims, teacher=teacher)


def network_cost(run: Run, *, dims: tuple[int, ...], teacher: int) -> StepCost:
    """As `step_cost`, from the widths of the features aligned with and the teachers' FLOPs."""
    model = run.model
    if model.net == "rdm":
        return StepCost(0, network_flops(run).total, 0, teacher, always_taught=True)
    return training_step_flops(
        **_sizes(run),
        warmup_depth=min(run.plan.depth, model.depth),
        dims=dims,
        projector_hidden=model.projector,
        teacher=teacher,
    )


def network_flops(run: Run) -> Flops:
    """Forward and backward of a resolved run's whole network on one image."""
    if run.model.net == "rdm":
        assert run.model.class_dim
        return rdm_flops(dim=run.model.class_dim, width=run.model.width, depth=run.model.depth)
    return sit_flops(**_sizes(run))


def parameter_count(run: Run) -> int:
    """Parameters of a resolved run's network."""
    with torch.device("meta"):
        net = build_model(run.model, outputs=run.flow.outputs)
    return sum(p.numel() for p in net.parameters())


def _sizes(run: Run) -> dict[str, Any]:
    """A resolved SiT's sizes, in the words of its cost."""
    model = run.model
    assert model.input_size and model.channels
    return {
        **{name: getattr(model, name) for name in ("depth", "width", "patch", "channels")},
        **{"mlp": model.mlp, "adaln_shift": model.adaln_shift, "outputs": run.flow.outputs},
        "tokens": grid_of(model.input_size, model.patch) ** 2,
        **token_sizes(model),
    }


def token_sizes(model: Model) -> dict[str, int]:
    """The class token's part in the network, in the words of `SiT` and of its cost."""
    width = model.class_dim or 0
    return {
        "class_token": width if model.class_token == "denoised" else 0,
        "representation": width if model.class_token == "given" else 0,
    }
