"""What a transformer represents at which depth, at which noise time, after how many steps.

| metric | of                                                                             |
| cknna  | tokens' mean against an encoder's, nearest-neighbour alignment (REPA, Fig. 2)  |
| cka    | the same, linear centred kernel alignment                                      |
| probe  | classes, by a linear map from the tokens' mean                                 |
| knn    | classes, by the nearest neighbours                                             |

Depths count blocks from 1. The network gets the null class for every image, so that its states hold
nothing of the label. Means have length 1 before cknna and cka, as in Huh et al.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erw import ddpm, flow
from erw.config import Flow, nearest
from erw.data.cache import Cache
from erw.errors import ConfigError, DataError
from erw.evaluation import alignment
from erw.models.backbone import Backbone
from erw.rng import generator
from erw.sampling.generation import seed_noise
from erw.training.trained import Trained

BATCH = 64


class Material(NamedTuple):
    """Images to probe with: latents (n, C, h, w), labels (n,), an encoder's mean features (n, D).

    `rows` are their numbers in the cache, from which their noise follows; `token` has the encoder's
    class tokens (n, R) where the cache stores them.
    """

    rows: tuple[int, ...]
    latents: Tensor
    labels: Tensor
    target: Tensor
    encoder: str
    token: Tensor | None = None


class Point(NamedTuple):
    """One value: of which run, after how many steps, at which noise time, after which block."""

    run: str
    step: int
    time: float
    depth: int
    value: float


_unit = partial(F.normalize, dim=-1)
METRICS: dict[str, Callable[[Tensor, Material, int], float]] = {
    "cknna": lambda x, images, k: alignment.cknna(_unit(x), _unit(images.target.double()), k=k),
    "cka": lambda x, images, _: alignment.cka(_unit(x), _unit(images.target.double())),
    "probe": lambda x, images, _: alignment.linear_probe(x, images.labels),
    "knn": lambda x, images, _: alignment.knn_accuracy(x, images.labels),
}
"""Name -> (mean tokens (n, D), float64, images, neighbours of cknna) -> value."""


def cknna(
    model: Trained, *, data: Cache | str | Path, encoder: str | None = None, time: float = 0.0,
    count: int = 2000, **options: Any,
) -> dict[int, float]:  # fmt: skip
    """CKNNA of a model's blocks with an encoder: depth, counted from 1 -> value.

    `data`, `encoder` and `count` as for `material`; `options` (depths, k) as for `curve`.
    """
    images = material(data, encoder=encoder, count=count)
    return {p.depth: p.value for p in curve(model, images, times=(time,), **options)}


def curve(
    model: Trained, images: Material, *, metric: str = "cknna", times: Sequence[float] = (0.0,),
    depths: Sequence[int] = (), k: int = 10, name: str = "",
) -> Iterator[Point]:  # fmt: skip
    """A metric over noise times, 0 (clean) to 1 (noise alone), and depths (empty: all).

    `k` neighbours are for cknna; `name` is that of the run.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}{nearest(metric, METRICS)}")
    for time in times:
        for depth, x in hidden_states(model, images, time=time, depths=depths).items():
            yield Point(name, model.step, time, depth, METRICS[metric](x.double(), images, k))


@torch.no_grad()
def hidden_states(
    model: Trained, images: Material, *, time: float = 0.0, depths: Sequence[int] = ()
) -> dict[int, Tensor]:
    """Mean patch tokens (n, D) of a model by depth, on images noised to one time."""
    net, shape = model.net, tuple(images.latents.shape[1:])
    depths = tuple(depths) or tuple(range(1, net.depth + 1))
    if not 0 <= time <= 1:
        raise ConfigError(f"time {time}: expected 0 (clean) to 1 (noise)")
    if wrong := set(depths) - set(range(1, net.depth + 1)):
        raise ConfigError(f"depth {min(wrong)}: the model has blocks 1 to {net.depth}")
    if shape != tuple(net.latent_shape):
        raise DataError(f"latents are {shape}, the model's are {net.latent_shape}: give its cache")
    clean, _ = network_inputs(net, images.latents, images.labels, images.token)
    device = next(net.parameters()).device
    pooled: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    for lo in range(0, len(images.rows), BATCH):
        part = slice(lo, lo + BATCH)
        x = clean[part].to(device)
        eps = seed_noise(images.rows[part], shape, "start", token=net.class_token).to(device)
        x_t, t, *_ = noised(model.run.flow, x, eps, torch.full((len(x),), time, device=device))
        x_t = x_t if time else x  # the first step of a DiT's chain has some noise
        for depth, h in net(x_t, t, None, tap=depths).hidden.items():
            h = h[:, 1:] if net.class_token else h  # patches alone
            pooled[depth].append(h.float().mean(1).cpu())
    return {depth: torch.cat(parts) for depth, parts in pooled.items()}


def noised(settings: Flow, x: Tensor, eps: Tensor, t: Tensor) -> flow.Noised:
    """The clean batch x (B, ...) noised to times t (B,) as the objective of these settings does;
    with a DiT's steps in place of the times."""
    if settings.objective == "ddpm":
        step = ddpm.step_at(t)
        return flow.Noised(ddpm.noised(ddpm.chain(), x, eps, step), step, eps - x, eps)
    return flow.noise(x, eps, t, path=flow.PATHS[settings.path])


def network_inputs(
    net: Backbone, latents: Tensor, labels: Tensor, token: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(clean state, condition) as a `SiT` takes them: with a class token joined to the latents, or
    with a representation in place of the label."""
    width = net.class_token or net.representation
    labels = labels if net.null_class else torch.zeros_like(labels)
    if not width:
        return latents, labels
    if token is None or token.shape[1] != width:
        raise DataError(f"the model needs class tokens of {width} channels: give its own cache")
    if net.representation:
        return latents, F.layer_norm(token, token.shape[1:])
    return torch.cat([latents.flatten(1), token], 1), labels


def material(
    data: Cache | str | Path | Sequence[str], *, encoder: str | None = None, count: int = 2000
) -> Material:
    """`count` images of a cache with the features of one of its encoders (None: the first).

    The same ones every time. Raises CacheError where the cache has no such features.
    """
    cache = data if isinstance(data, Cache) else Cache.open(data)
    encoder = encoder or next(iter(cache.features), "dinov2-b")
    cache.require(encoders=(encoder,))
    rows = torch.randperm(len(cache), generator=generator(0, "analysis"))[:count].sort().values
    token = encoder if cache.features[encoder].class_dim else ""
    parts = []
    for part in rows.split(BATCH):
        batch = cache.read(part.numpy(), features=(encoder,), token=token)
        means = batch.features[0].mean(1).float()
        parts.append([batch.mean, batch.labels, means, *([batch.token] if token else [])])
    latents, labels, target, *tokens = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
    return Material(tuple(rows.tolist()), latents, labels, target, encoder, *tokens)
