"""Fewer numbers a token: principal components of an encoder's features, fitted once a cache.

Fitted on n images, at most `IMAGES`, at even distances over the source that the cache was begun
with: image number floor(i * count / n) for i = 0 .. n - 1, less those that cannot be read, cropped
as they are stored, not mirrored. (The first n of a sorted folder would be of a few classes only.)
Covariance in float64; each component points where its largest entry is positive.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erw.data.shards import Column, Written, hash_file, write_shard
from erw.errors import CacheError, DataError
from erw.io import write_text

IMAGES = 2048


@dataclass(frozen=True)
class Pca:
    """mean: float32 (D,). components: float32 (k, D), orthonormal, the largest variance first.

    variance: share of the tokens' variance that the components keep.
    """

    mean: Tensor
    components: Tensor
    variance: float

    def reduce(self, tokens: Tensor) -> Tensor:
        """(..., D) to (..., k)."""
        return (tokens - self.mean.to(tokens)) @ self.components.to(tokens).T

    def expand(self, reduced: Tensor) -> Tensor:
        """(..., k) back to the nearest (..., D)."""
        return reduced @ self.components.to(reduced) + self.mean.to(reduced)


def numbers(count: int) -> list[int]:
    """Which of `count` images are fitted to."""
    used = min(count, IMAGES)
    return [i * count // used for i in range(used)]


def fit(batches: Iterable[Tensor], kept: int, *, name: str) -> tuple[Pca, int]:
    """The `kept` principal components of token batches (B, T, D), and how many images there were.

    Raises `DataError` if there are fewer tokens than components.
    """
    images, tokens = 0, 0
    total = products = torch.zeros(())
    for batch in batches:
        flat = batch.detach().cpu().double().flatten(0, -2)
        images, tokens = images + len(batch), tokens + len(flat)
        total, products = total + flat.sum(0), products + flat.T @ flat
    if tokens < kept:
        raise DataError(f"{tokens} tokens of {name} do not determine {kept} components")
    mean = total / tokens
    values, vectors = torch.linalg.eigh(products / tokens - torch.outer(mean, mean))
    values, components = values.flip(0).clamp_min(0), vectors.flip(1).T[:kept]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    share = float(values[:kept].sum() / values.sum().clamp_min(1e-300))
    return Pca(mean.float(), components.float().contiguous(), share), images


def write(folder: Path, encoder: int, pca: Pca, *, images: int) -> None:
    """Write pca.N.safetensors and, after it, its record; a record that is there must agree."""
    columns = {
        "mean": Column("float32", pca.mean.numpy()),
        "components": Column("float32", pca.components.numpy()),
    }
    before = read_record(folder, encoder)
    written = write_shard(path(folder, encoder), columns)
    told = written._asdict() | {"variance": pca.variance, "images": images}
    if before is not None and before != told:
        raise CacheError(
            f"{path(folder, encoder)} was lost, and fitting again gives other components: features "
            "that were made with the first ones are there, so prepare another cache"
        )
    write_record(folder, encoder, told)


def write_record(folder: Path, encoder: int, told: dict[str, Any]) -> None:
    """Write what `read_record` reads."""
    write_text(_record(folder, encoder), json.dumps(told, sort_keys=True))


def read(folder: Path, encoder: int) -> Pca | None:
    """What reduces the features of encoder number `encoder`; None if it is not fitted.

    Raises `CacheError` if the file is damaged.
    """
    told = read_record(folder, encoder)
    if told is None or not path(folder, encoder).is_file():
        return None
    return _load(path(folder, encoder), told)


def components(cache: Any, encoder: str) -> Pca:
    """What reduced the features of an encoder in an open cache.

    Raises `CacheError` if they are whole, or the file is damaged.
    """
    told = cache.manifest.pca.get(encoder)
    if told is None:
        raise CacheError(f"cache {cache.where} holds no components for {encoder}")
    return _load(cache.file(Written(told["file"], told["bytes"], told["blake3"])), told)


def _load(file: Path, told: dict[str, Any]) -> Pca:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if hash_file(file) != told["blake3"]:
            raise CacheError(f"{file} is damaged: erw prepare --repair")
        held = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{file} cannot be read ({error}): erw prepare --repair") from error
    mean, kept = (torch.from_numpy(np.array(held[key])) for key in ("mean", "components"))
    return Pca(mean, kept, told["variance"])


def read_record(folder: Path, encoder: int) -> dict[str, Any] | None:
    """File, bytes, blake3, variance and images; None if it was not fitted yet."""
    try:
        return json.loads(_record(folder, encoder).read_text())
    except (OSError, ValueError):
        return None


def path(folder: Path, encoder: int) -> Path:
    """Where mean and components lie."""
    return folder / f"pca.{encoder}.safetensors"


def _record(folder: Path, encoder: int) -> Path:
    return folder / f"pca.{encoder}.json"
