"""What networks are shown to find out what they know: images as latents, and an encoder's features.

From a cache, or from images that are in none: these are encoded on the way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from erw.data.cache import Cache
from erw.data.sources import BUILT_IN
from erw.encoders.base import Encoder
from erw.errors import ConfigError, DataError
from erw.rng import generator


class Material(NamedTuple):
    """What is shown: latents (n, C, h, w), labels (n,), an encoder's mean-pooled features (n, D).

    `rows` number the images in their cache or source; the noise of each is a function of it.
    `spatial` is how spatial the encoder's own tokens are; `class_names` are those of the labels;
    `token`: the encoder's class tokens (n, R), where the cache has them.
    """

    rows: tuple[int, ...]
    latents: Tensor
    labels: Tensor
    target: Tensor
    encoder: str
    spatial: float | None = None
    class_names: tuple[str, ...] = ()
    token: Tensor | None = None


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
            raise ConfigError(f"cache {cache.where} holds no features: name an encoder")
    n = min(count, len(cache))
    if n < 4:
        raise DataError(f"{n} images: similarity of representations needs at least 4")
    rows = torch.randperm(len(cache), generator=generator(0, "analysis"))[:n].sort().values
    held = name in cache.features and not isinstance(encoder, Encoder)
    if not held and not isinstance(encoder, Encoder):
        from erw.encoders.registry import load_encoder

        encoder = load_encoder(name)
    whole = name if held and cache.features[name].class_dim else ""
    latents, labels, targets, kept, spatial = [], [], [], [], 0.0
    for part in rows.split(64):
        index = part.numpy()
        batch = cache.read(index, features=(name,) if held else (), token=whole)
        tokens = batch.features[0] if held else _encoded(encoder, cache, index)
        latents.append(batch.mean.cpu())
        labels.append(batch.labels.cpu())
        targets.append(tokens.mean(1).float().cpu())
        kept += [] if batch.token is None else [batch.token.cpu()]
        spatial += float(local_over_distant(tokens).sum()) / n
    where = tuple(int(row) for row in rows)
    shown = (torch.cat(latents), torch.cat(labels), torch.cat(targets))
    token = torch.cat(kept) if kept else None
    return Material(where, *shown, name, spatial, tuple(cache.class_names), token)


@contextmanager
def uncached(
    images: str | Path, *, vae: str, encoder: str, image_size: int, count: int = 2000
) -> Iterator[Cache]:
    """Images that are in no cache, read like one of them: cropped and encoded when they are read.

    Args:
        images: a folder, zip or table, or a built-in set.
        vae, encoder: by name; see `erw.prepare`.
        count: how many of a built-in set to compose; others are as many as they are.

    Raises:
        ConfigError, DataError: see `erw.data.online.write`.
    """
    from erw.data.online import write

    options: dict[str, Any] = {}
    if str(images) in BUILT_IN:
        options = {"size": image_size, "count": count}
    with TemporaryDirectory() as folder:
        yield write(
            images, folder, vae=vae, encoders=(encoder,), image_size=image_size,
            precision="float32", **options,
        )  # fmt: skip


def local_over_distant(tokens: Tensor) -> Tensor:
    """How spatial tokens (B, T, D) of a square grid are (B,): cosine of neighbours less of far.

    The mean cosine similarity of tokens that touch, less that of tokens whose Manhattan distance is
    at least 6 of 16 (3/8 of the side, 2 at least). Source: LDS of iREPA (arXiv 2512.10794) and its
    released code, which has 6 for every grid. 0 for a grid without distant tokens.
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


def _encoded(encoder: Any, cache: Cache, index: np.ndarray) -> Tensor:
    device = next(encoder.parameters()).device
    return encoder(cache.images(index).to(device))
