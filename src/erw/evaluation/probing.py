"""What a transformer represents at which depth, at which noise time, after how many steps.

| metric     | of                                                                             |
| cknna      | tokens' mean against an encoder's, nearest-neighbour alignment (REPA, Fig. 2)  |
| cka        | the same, linear centred kernel alignment                                      |
| mutual_knn | the same, share of nearest neighbours in common                                |
| probe      | classes, by a linear map from the tokens' mean                                 |
| knn        | classes, by the nearest neighbours                                             |
| spatial    | tokens alone: similarity of neighbours less that of distant ones (LDS, iREPA)  |

Depths count blocks from 1. The network gets no labels unless asked to. Means have length 1 before
cknna, cka and mutual_knn, as in Huh et al.: otherwise a few long vectors decide what is near.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erw import ddpm, flow
from erw.config import Flow, nearest
from erw.data.cache import Cache
from erw.data.sources import BUILT_IN
from erw.encoders.base import Encoder
from erw.errors import ConfigError, DataError
from erw.evaluation import alignment
from erw.models.backbone import Backbone
from erw.rng import generator
from erw.sampling.generation import start_noise
from erw.training.trained import Trained

Labels = Literal["null", "given"]


class Material(NamedTuple):
    """Images to probe with: latents (n, C, h, w), labels (n,), an encoder's mean features (n, D).

    `rows` are their numbers in the cache; the noise of each is a function of its number. `spatial`
    is `local_over_distant` of the encoder's tokens, `class_names` are those of the labels, `token`
    has the encoder's class tokens (n, R) where the cache stores them.
    """

    rows: tuple[int, ...]
    latents: Tensor
    labels: Tensor
    target: Tensor
    encoder: str
    spatial: float = 0.0
    class_names: tuple[str, ...] = ()
    token: Tensor | None = None


class State(NamedTuple):
    """Hidden states after a block: tokens' mean (n, D), and the mean of `local_over_distant`."""

    pooled: Tensor
    spatial: float


class Point(NamedTuple):
    """One value: of which run, after how many steps, at which noise time, after which block."""

    run: str
    step: int
    time: float
    depth: int
    value: float


def _units(state: State, images: Material) -> tuple[Tensor, Tensor]:
    return F.normalize(state.pooled.double(), dim=-1), F.normalize(images.target.double(), dim=-1)


METRICS: dict[str, Callable[[State, Material, int, bool], float]] = {
    "cknna": lambda state, images, k, unbiased: alignment.cknna(
        *_units(state, images), k=k, unbiased=unbiased
    ),
    "cka": lambda state, images, _, unbiased: alignment.cka(
        *_units(state, images), unbiased=unbiased
    ),
    "mutual_knn": lambda state, images, k, _: alignment.mutual_knn(*_units(state, images), k=k),
    "probe": lambda state, images, *_: alignment.linear_probe(state.pooled, images.labels),
    "knn": lambda state, images, *_: alignment.knn_accuracy(state.pooled, images.labels),
    "spatial": lambda state, *_: state.spatial,
}
"""Name -> (states, images, neighbours, estimate of HSIC) -> value."""


def cknna(
    model: Trained,
    *,
    data: Cache | str | Path,
    encoder: str | Encoder | None = None,
    time: float = 0.0,
    depths: Sequence[int] = (),
    count: int = 2000,
    k: int = 10,
    unbiased: bool = True,
) -> dict[int, float]:
    """CKNNA of a model's blocks with an encoder: depth, counted from 1 -> value.

    `erw.evaluation.cknna` compares two sets of features directly.

    Args:
        data: a cache with the encoder's features, or with images.
        encoder: a name or an encoder; None: the first in the cache.
        time: noise time, 0 (clean) to 1 (noise alone).
        count: images; REPA has 10,000.

    Raises:
        CacheError, ConfigError, DataError: see `material` and `curve`.
    """
    images = material(data, encoder=encoder, count=count)
    points = curve(model, images, times=(time,), depths=depths, k=k, unbiased=unbiased)
    return {p.depth: p.value for p in points}


def curve(
    model: Trained,
    images: Material,
    *,
    metric: str = "cknna",
    times: Sequence[float] = (0.0,),
    depths: Sequence[int] = (),
    k: int = 10,
    unbiased: bool = True,
    labels: Labels = "null",
    batch_size: int = 64,
    name: str = "",
) -> Iterator[Point]:
    """A metric over depth and noise time, time by time.

    Args:
        depths, labels: see `hidden_states`.
        k: neighbours, for cknna and mutual_knn.
        unbiased: the estimate of HSIC, for cknna and cka.
        name: of the run, in the points.

    Raises:
        ConfigError: an unknown metric, an impossible time or depth.
        DataError: too few images for k, or one class where classes are needed.
    """
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}{nearest(metric, METRICS)}")
    options: dict[str, Any] = {"depths": depths, "labels": labels, "batch_size": batch_size}
    for time in times:
        for depth, state in hidden_states(model, images, time=time, **options).items():
            value = METRICS[metric](state, images, k, unbiased)
            yield Point(name, model.step, time, depth, value)


def reference(images: Material, *, metric: str) -> float | None:
    """The value of the encoder's own features, for probe, knn and spatial; None for the others."""
    if metric not in ("probe", "knn", "spatial"):
        return None
    return METRICS[metric](State(images.target, images.spatial), images, 0, True)


def over_steps(steps: Sequence[float], values: Sequence[float]) -> dict[str, Any] | None:
    """A value over rising steps: first, lowest and last, and the step of the lowest.

    `u_shaped`: the lowest lies strictly between, and at least a tenth of the fall comes back. None
    for fewer than 3 steps.
    """
    if len(steps) < 3:
        return None
    first, low, last = values[0], min(values), values[-1]
    i = values.index(low)
    u_shaped = 0 < i < len(values) - 1 and last - low >= 0.1 * (first - low)
    meta = {"first": first, "lowest": low, "last": last}
    return meta | {"step": int(steps[i]), "u_shaped": u_shaped}


@torch.no_grad()
def hidden_states(
    model: Trained,
    images: Material,
    *,
    time: float = 0.0,
    depths: Sequence[int] = (),
    labels: Labels = "null",
    batch_size: int = 64,
) -> dict[int, State]:
    """Hidden states of a model by depth, on images noised to one time.

    Args:
        depths: after which blocks; empty: all.
        labels: "null": the null class for every image, so that the states hold nothing of the
            label; "given": each image's own.

    Raises:
        ConfigError: a time outside 0..1, or a depth that the model does not have.
        DataError: latents of another shape than the model's.
    """
    net, shape = model.net, tuple(images.latents.shape[1:])
    depths = tuple(depths) or tuple(range(1, net.depth + 1))
    if not 0 <= time <= 1:
        raise ConfigError(f"time {time}: expected 0 (clean) to 1 (noise)")
    if wrong := [depth for depth in depths if not 1 <= depth <= net.depth]:
        raise ConfigError(f"depth {wrong[0]}: the model has blocks 1 to {net.depth}")
    if shape != tuple(net.latent_shape):
        raise DataError(
            f"the latents are {shape}, the model's are {tuple(net.latent_shape)}: give the cache "
            "that it was trained on, or images with its VAE"
        )
    names = {model.class_names, images.class_names} - {()}
    if labels == "given" and len(names) == 2:
        raise ConfigError("labels given: the images have other classes than the model")
    clean, condition = network_inputs(net, images.latents, images.labels, images.token)
    device = next(net.parameters()).device
    pooled: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    spatial = dict.fromkeys(depths, 0.0)
    for lo in range(0, len(images.rows), batch_size):
        part = slice(lo, lo + batch_size)
        eps = start_noise(images.rows[part], shape, token=net.class_token).to(device)
        y = condition[part].to(device) if labels == "given" else None
        x_t, t = _noised(model.run.flow, clean[part].to(device), eps, time)
        for depth, h in net(x_t, t, y, tap=depths).hidden.items():
            h = h[:, 1:] if net.class_token else h  # patches alone
            pooled[depth].append(h.float().mean(1).cpu())
            spatial[depth] += float(local_over_distant(h).sum()) / len(images.rows)
    return {depth: State(torch.cat(pooled[depth]), spatial[depth]) for depth in depths}


def _noised(settings: Flow, x: Tensor, eps: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """Latents at a noise time as the model's objective has them, and the network's `t`: the time
    or, of a DiT, the step of its chain (the first for clean latents)."""
    t = torch.full((len(x),), time, device=x.device)
    if settings.objective == "flow":
        return flow.noise(x, eps, t, path=flow.PATHS[settings.path]).x_t, t
    step = ddpm.step_at(t)
    return (ddpm.noised(ddpm.chain(), x, eps, step) if time else x), step


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
        raise DataError(
            f"the model needs class tokens of {width} channels, which this cache does not have: "
            "give the cache that it was trained on, or prepare one with --class-token"
        )
    if net.representation:
        return latents, F.layer_norm(token, token.shape[1:])
    return torch.cat([latents.flatten(1), token], 1), labels


def material(
    data: Cache | str | Path | Sequence[str],
    *,
    encoder: str | Encoder | None = None,
    count: int = 2000,
) -> Material:
    """`count` images of a cache with the features of one encoder, the same ones every time.

    Args:
        encoder: one whose features the cache has (None: its first), or any encoder or name, which
            is then run on the images of a cache that was prepared with --images.

    Raises:
        CacheError: no such cache, or neither these features nor images in it.
    """
    cache = data if isinstance(data, Cache) else Cache.open(data)
    encoder = encoder or next(iter(cache.features), None)
    if encoder is None:
        raise ConfigError(f"cache {cache.where} holds no features: name an encoder")
    rows = torch.randperm(len(cache), generator=generator(0, "analysis"))[:count].sort().values
    cached = [encoder] if isinstance(encoder, str) and encoder in cache.features else []
    if isinstance(encoder, str) and not cached:
        from erw.encoders.registry import load_encoder

        encoder = load_encoder(encoder)
    token = cached[0] if cached and cache.features[cached[0]].class_dim else ""
    columns: dict[str, list[Tensor]] = {"latents": [], "labels": [], "target": [], "token": []}
    spatial = 0.0
    for part in rows.split(64):
        batch = cache.read(part.numpy(), features=cached, token=token)
        if isinstance(encoder, Encoder):
            tokens = encoder(cache.images(part.numpy()).to(encoder.device))
        else:
            tokens = batch.features[0]
        parts = batch.mean, batch.labels, tokens.mean(1).float(), batch.token
        for column, values in zip(columns.values(), parts, strict=True):
            column += [] if values is None else [values.cpu()]
        spatial += float(local_over_distant(tokens).sum()) / len(rows)
    return Material(
        rows=tuple(rows.tolist()),
        **{name: torch.cat(parts) for name, parts in columns.items() if parts},
        encoder=encoder if isinstance(encoder, str) else encoder.name,
        spatial=spatial,
        class_names=tuple(cache.class_names),
    )


@contextmanager
def uncached(
    images: str | Path, *, vae: str, encoder: str, image_size: int, count: int = 2000
) -> Iterator[Cache]:
    """Images without a cache, read as if from one: cropped and encoded when they are read.

    `images` is a folder, zip or table, or a built-in set, of which `count` are composed.
    """
    from erw.data.on_the_fly import write

    options: dict[str, Any] = {"vae": vae, "encoders": (encoder,), "image_size": image_size}
    if str(images) in BUILT_IN:
        options |= {"size": image_size, "count": count}
    with TemporaryDirectory() as folder:
        yield write(images, folder, precision="float32", **options)


def local_over_distant(tokens: Tensor) -> Tensor:
    """How spatial tokens (B, T, D) of a square grid are (B,): cosine of neighbours less of distant.

    The mean cosine similarity of tokens that touch, less that of tokens whose Manhattan distance is
    at least 6 of 16 (3/8 of the side, 2 at least). Source: LDS of iREPA (arXiv 2512.10794) and its
    released code, which has 6 for every grid. NaN for a single token.
    """
    side = round(tokens.shape[1] ** 0.5)
    place = torch.arange(side * side, device=tokens.device)
    rows, columns = place // side, place % side
    gaps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    unit = F.normalize(tokens.float(), dim=-1)
    similar = unit @ unit.transpose(1, 2)
    near, far = gaps == 1, gaps >= max(2, 3 * side // 8)
    return similar[:, near].mean(1) - similar[:, far].mean(1)
