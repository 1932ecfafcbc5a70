"""From images to statistics: features of a frozen encoder, in one pass; a reference's are kept."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from erw.errors import DataError
from erw.evaluate.distances import Moments
from erw.evaluate.inputs import ImageSet


class PooledEncoder(Protocol):
    """What is asked of an encoder; every `erw.encoders.base.Encoder` with `pooled` is one.

    An attribute `kept`, if there is one, says how many leading features of an image are kept where
    all are asked for; moments are of all of them.
    """

    name: str

    def pooled(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Statistics:
    """Features of a set of images: their moments, all of them if they were kept, their resolution.

    `resolution` is (height, width) of the images, None when it is not known.
    """

    moments: Moments
    features: Tensor | None = None
    resolution: tuple[int, int] | None = None


def statistics(
    images: ImageSet,
    encoder: PooledEncoder,
    *,
    keep: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Statistics of `images` under `encoder.pooled`; `keep` holds on to all features (N, D).

    Raises NumericsError for features that are not finite.
    """
    columns: int | None = getattr(encoder, "kept", None)
    device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else "cpu"
    kept: list[Tensor] = []
    resolution: list[tuple[int, int]] = []

    def passing() -> Iterator[Tensor]:
        for batch in images.batches(batch_size):
            resolution.append((batch.shape[2], batch.shape[3]))
            features = encoder.pooled(batch.to(device)).cpu()
            if keep:
                kept.append(features if columns is None else features[:, :columns].clone())
            yield features
            if progress:
                progress(len(batch))

    moments = Moments.of(passing())
    return Statistics(moments, torch.cat(kept) if keep else None, resolution[0])


def cached_statistics(
    images: ImageSet,
    encoder: PooledEncoder,
    *,
    weights: str,
    keep: bool = False,
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """`statistics`, kept in `folder` (None: the user's cache) under a hash of images and weights.

    A file that cannot be read is made again; one that cannot be written only costs time.
    """
    if not images.content:
        return statistics(images, encoder, keep=keep, batch_size=batch_size, progress=progress)
    folder = Path(folder) if folder is not None else cache_folder() / "statistics"
    path = folder / f"{images.content}-{images.count}-{weights}.safetensors"
    found = _load(path)
    if found is not None and (found.features is not None or not keep):
        return found
    made = statistics(images, encoder, keep=keep, batch_size=batch_size, progress=progress)
    _save(path, made)
    return made


def cache_folder() -> Path:
    """The user's cache folder of erw: $XDG_CACHE_HOME/erw, or ~/.cache/erw."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "erw"


def save_statistics(path: str | Path, found: Statistics) -> None:
    """Write statistics as safetensors, to be given as a reference later."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = found.moments
    tensors = {
        "count": torch.tensor(moments.count),
        "mean": moments.mean.contiguous(),
        "scatter": moments.scatter.contiguous(),
    }
    if found.features is not None:
        tensors["features"] = found.features.contiguous()
    if found.resolution is not None:
        tensors["resolution"] = torch.tensor(found.resolution)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_statistics(path: str | Path) -> Statistics:
    """What `save_statistics` wrote. Raises FileNotFoundError, or DataError for another file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        moments = Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"])
    except (SafetensorError, KeyError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path} holds no statistics of ours ({error}): make it again") from error
    resolution = tensors.get("resolution")
    sides = None if resolution is None else (int(resolution[0]), int(resolution[1]))
    return Statistics(moments, tensors.get("features"), sides)


def _load(path: Path) -> Statistics | None:
    try:
        return load_statistics(path)
    except (FileNotFoundError, DataError):
        return None


def _save(path: Path, made: Statistics) -> None:
    try:
        save_statistics(path, made)
    except OSError:
        return
