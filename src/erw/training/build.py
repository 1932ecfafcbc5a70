"""A run's settings filled in by its cache."""

import dataclasses
from typing import Any

from erw.config import Run
from erw.data.cache import Cache
from erw.errors import ConfigError
from erw.models.sit import grid_of


def resolve(run: Run, cache: Cache) -> Run:
    """The run with everything filled in that the cache decides: latent shape, classes, features.

    Raises:
        ConfigError, CacheError: settings and cache do not fit each other.
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
        if getattr(run.model, name) not in (None, value):
            raise ConfigError(
                f"model.{name} is {getattr(run.model, name)}, but the cache {cache.where} has "
                f"{value}; leave it out to take the cache's"
            )
    features = _features(run, cache, token)
    model = dataclasses.replace(run.model, **decided)
    if model.net != "rdm":
        cache.require(encoders=features, tokens=grid_of(size, model.patch) ** 2)
    data = dataclasses.replace(run.data, features=features, class_token=token or None)
    return run.replace(model=model, data=data)


def _features(run: Run, cache: Cache, token: str) -> tuple[str, ...]:
    """The encoders whose features the plan's terms read."""
    terms = [term for term in run.plan.active if term.reads_encoder]
    if not terms:
        return ()
    if not (run.data.features or cache.features):
        raise ConfigError(
            f"the plan aligns with an encoder, but the cache {cache.where} holds no features; "
            "prepare it with --encoders, or train a recipe of SiT"
        )
    named = tuple(term.encoder for term in terms if term.encoder)
    if run.model.class_token == "denoised":
        features = run.data.features or (token,)
        if features != (token,):
            raise ConfigError(
                f"data.features is {', '.join(features)}, but the class token is of {token}, and "
                "REG aligns both with one encoder; leave it out, or train without alignment"
            )
    elif all(term.encoder for term in terms):
        features = run.data.features or tuple(dict.fromkeys(named))
    else:
        features = run.data.features or tuple(cache.features)
    for name in named:
        if name not in features:
            raise ConfigError(
                f"plan.align has target encoder:{name}, which is not among the encoders that the "
                f"run reads ({', '.join(features)}); add it to data.features"
            )
    return features


def token_encoder(run: Run, cache: Cache) -> str:
    """The encoder whose class token the run reads. Raises as `resolve`."""
    if run.data.class_token:
        cache.require(token=run.data.class_token)
        return run.data.class_token
    names = [name for name, spec in cache.features.items() if spec.class_dim]
    if not names:
        cache.require(token=next(iter(cache.features), "dinov2-b"))
    if len(names) > 1:
        raise ConfigError(
            f"the cache {cache.where} has class tokens of {', '.join(names)}; choose one with "
            "--data.class_token"
        )
    return names[0]
