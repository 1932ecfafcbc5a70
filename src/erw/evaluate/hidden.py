"""Hidden states of a transformer on images that it is shown at a chosen noise time.

A run's EMA weights or one of its checkpoints, or any network with SiT's taps, is given the latents
of n images, noised to time t (0: clean, 1: noise alone). Depths count blocks from 1. What is kept
of each block is the mean over its tokens, as REPA compares them, and how spatial its tokens are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erw import flow
from erw.data.cache import Cache
from erw.draws import generator
from erw.encoders.base import Encoder
from erw.errors import CheckpointError, ConfigError, DataError
from erw.sample.seeds import start_noise
from erw.train import checkpoint
from erw.train.load import Trained, load

Labels = Literal["null", "given"]


class Material(NamedTuple):
    """What is shown: latents (n, C, h, w), labels (n,), an encoder's mean-pooled features (n, D).

    `rows` number the images in their cache or source; the noise of each is a function of it.
    """

    rows: tuple[int, ...]
    latents: Tensor
    labels: Tensor
    target: Tensor
    encoder: str


class States(NamedTuple):
    """Of each depth: tokens' mean (n, D) and the images' mean spatial score."""

    pooled: dict[int, Tensor]
    spatial: dict[int, float]


def material(
    data: Cache | str | Path, *, encoder: str | Encoder | None = None, count: int = 2000
) -> Material:
    """`count` images of a cache with the features of one encoder, the same ones every time.

    Args:
        encoder: one whose features the cache holds (None: its first), or any encoder or name, which
            is then run on the images of a cache that was prepared with --images.

    Raises:
        CacheError: no such cache, or neither these features nor images in it.
        DataError: fewer than 4 images.
    """
    cache = data if isinstance(data, Cache) else Cache.open(data)
    name = encoder if isinstance(encoder, str) else getattr(encoder, "name", None)
    if name is None:
        name = next(iter(cache.features), None)
        if name is None:
            raise ConfigError(f"cache {cache.path} holds no features: name an encoder")
    n = min(count, len(cache))
    if n < 4:
        raise DataError(f"{n} images: similarity of representations needs at least 4")
    rows = torch.randperm(len(cache), generator=generator(0, "analysis"))[:n].sort().values
    held = name in cache.features and not isinstance(encoder, Encoder)
    if not held and not isinstance(encoder, Encoder):
        from erw.encoders.registry import load_encoder

        encoder = load_encoder(name)
    latents, labels, targets = [], [], []
    for part in rows.split(64):
        index = part.numpy()
        batch = cache.read(index, features=(name,) if held else ())
        latents.append(batch.mean)
        labels.append(batch.labels)
        targets.append(batch.features[0].mean(1) if held else _encoded(encoder, cache, index))
    where = tuple(int(row) for row in rows)
    return Material(where, torch.cat(latents), torch.cat(labels), torch.cat(targets), name)


def _encoded(encoder: Any, cache: Cache, index: np.ndarray) -> Tensor:
    device = next(encoder.parameters()).device
    return encoder(cache.images(index).to(device)).mean(1).float().cpu()


@torch.no_grad()
def hidden_states(
    model: Any,
    shown: Material,
    *,
    time: float = 0.0,
    depths: Sequence[int] = (),
    labels: Labels = "null",
    batch_size: int = 64,
) -> States:
    """Hidden states of a model on the images of `shown` at one noise time.

    Args:
        model: a `Trained` run, a `Pretrained` network, or a `SiT`.
        depths: after which blocks; empty: all.
        labels: "null": the null class for every image, so that nothing of the label is in the
            states; "given": each image's own.

    Raises:
        ConfigError: a time outside 0..1, or a depth that the model does not have.
        DataError: latents of another shape than the model's.
    """
    net: nn.Module = model if isinstance(model, nn.Module) else model.net
    blocks: int = getattr(net, "depth", None) or model.net.depth
    depths = tuple(depths) or tuple(range(1, blocks + 1))
    if not 0 <= time <= 1:
        raise ConfigError(f"time {time}: expected 0 (clean) to 1 (noise)")
    if wrong := [depth for depth in depths if not 1 <= depth <= blocks]:
        raise ConfigError(f"depth {wrong[0]}: the model has blocks 1 to {blocks}")
    _check_latents(model, shown)
    run = getattr(model, "run", None)
    path = flow.PATHS[run.flow.path] if run is not None else flow.LINEAR
    device = next(net.parameters()).device
    pooled: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    spatial = dict.fromkeys(depths, 0.0)
    for lo in range(0, len(shown.rows), batch_size):
        part = slice(lo, lo + batch_size)
        x, rows = shown.latents[part].to(device), shown.rows[part]
        eps = start_noise(rows, tuple(x.shape[1:])).to(device)
        t = torch.full((len(x),), time, device=device)
        y = shown.labels[part].to(device) if labels == "given" else None
        x_t = flow.noise(x, eps, t, path=path).x_t
        for depth, h in net(x_t, t, y, tap=depths).hidden.items():
            pooled[depth].append(h.float().mean(1).cpu())
            spatial[depth] += float(local_over_distant(h).sum()) / len(shown.rows)
    return States({depth: torch.cat(parts) for depth, parts in pooled.items()}, spatial)


def local_over_distant(tokens: Tensor) -> Tensor:
    """How spatial tokens (B, T, D) of a square grid are (B,): cosine of neighbours less of far.

    The mean cosine similarity of tokens that touch, less that of tokens whose Manhattan distance is
    at least 6 of 16 (3/8 of the side, 2 at least). Source: LDS of iREPA (arXiv 2512.10794). 0 for a
    grid without distant tokens.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise DataError(f"{tokens.shape[1]} tokens are no square grid")
    place = torch.arange(side * side, device=tokens.device)
    rows, columns = place // side, place % side
    gaps = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    near, far = gaps == 1, gaps >= max(2, 3 * side // 8)
    if side < 2:
        return tokens.new_zeros(len(tokens)).float()
    unit = F.normalize(tokens.float(), dim=-1)
    similar = unit @ unit.transpose(1, 2)
    return similar[:, near].mean(1) - similar[:, far].mean(1)


def checkpoints(model: Trained, folder: str | Path) -> Iterator[tuple[int, Trained]]:
    """(step, model) with the EMA weights of every checkpoint that a run folder keeps, oldest first.

    Raises CheckpointError where there is none.
    """
    paths = checkpoint.paths(Path(folder) / "checkpoints")
    if not paths:
        raise CheckpointError(f"{folder} keeps no checkpoints: give --log.keep when training")
    for path in paths:
        found = load(path, device=next(model.net.parameters()).device)
        yield found.step, found


def _check_latents(model: Any, shown: Material) -> None:
    shape = getattr(model, "latent_shape", None)
    if shape is not None and tuple(shape) != tuple(shown.latents.shape[1:]):
        raise DataError(
            f"the cache's latents are {tuple(shown.latents.shape[1:])}, the model's are "
            f"{tuple(shape)}: give the cache that it was trained on, or one like it"
        )
