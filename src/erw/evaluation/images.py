"""What can be scored, as uint8 batches: tensors, generations, files, caches."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from erw.data.cache import Cache
from erw.data.images import Unreadable, channels
from erw.data.sources import FileSource, Source, open_source, where
from erw.data.sources.folder import Folder
from erw.errors import CacheError, DataError, NumericsError
from erw.io import hash_file
from erw.sampling.generation import Generation, Samples
from erw.sampling.save import image_shape, read_images, read_settings


@dataclass(frozen=True)
class ImageSet:
    """Images ready to be read.

    Attributes:
        name: for people, without folders of this machine.
        count: number of images.
        content: hash of the images, or of everything they follow from.
        batches: (batch size, first image, image to stop before) -> iterator over uint8
            (B, 3, H, W), all of one size; without the latter two, all images.
        settings: how they were generated, where that is known.
        resolution: (height, width) where it is known before they are read.
    """

    name: str
    count: int
    content: str
    batches: Callable[..., Iterator[Tensor]]
    settings: dict[str, Any] | None = None
    resolution: tuple[int, int] | None = None


Images = Tensor | np.ndarray | Samples | Generation | Source | Cache | ImageSet | str | Path


def image_set(images: Images, *, what: str = "images") -> ImageSet:
    """Any of the accepted kinds of images as an `ImageSet`; `what` names them in messages.

    Raises:
        DataError: fewer than 2 images, another dtype or shape, images of several sizes.
        CacheError: a cache without images.
        FileNotFoundError: nothing at the path.
    """
    if isinstance(images, ImageSet):
        return images
    opened = _open(images, what)
    if opened.count < 2:
        raise DataError(
            f"{what} {opened.name}: {opened.count} image{'' if opened.count == 1 else 's'}; "
            "statistics need at least 2"
        )

    def batches(batch_size: int, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        size: tuple[int, int] | None = None
        stop = opened.count if stop is None else stop
        for batch in opened.batches(batch_size, first, stop):
            _check(batch, f"{what} {opened.name}")
            before, size = size, (batch.shape[2], batch.shape[3])
            if before not in (None, size):
                raise DataError(
                    f"{what} {opened.name}: {sides(size)} after {sides(before)} images: bring them "
                    "to one size first"
                )
            yield batch

    return replace(opened, batches=batches)


def same_resolution(
    images: tuple[int, int] | None, reference: tuple[int, int] | None, name: str, other: str
) -> None:
    """Raises DataError where both (height, width) are known, and differ."""
    if images is not None and reference is not None and images != reference:
        raise DataError(
            f"images {name} are {sides(images)}, {other} is {sides(reference)}: scores would "
            "compare sizes; bring both to one size first"
        )


def sides(resolution: tuple[int, int] | None) -> str:
    """(height, width) as "width x height"."""
    return "unknown" if resolution is None else f"{resolution[1]} x {resolution[0]}"


def _open(images: Images, what: str) -> ImageSet:
    if isinstance(images, Samples):
        if images.images is None:
            raise DataError(f"{what} are latents without images: generate with a VAE")
        images = images.images
    if isinstance(images, Tensor | np.ndarray):
        return _of_tensor(images, what)
    if isinstance(images, Generation):
        return _of_generation(images, what)
    if isinstance(images, Cache):
        return _of_cache(images, what)
    if isinstance(images, str | Path):
        path = Path(images)
        if path.suffix == ".npz":
            return _of_npz(path)
        if any(
            (path / name).is_file() for name in ("manifest.json", "prepare.json", "online.json")
        ):
            return _of_cache(Cache.open(path), what)
        return _of_source(open_source(path, classes="none"), path)
    if isinstance(images, Source):
        return _of_source(images)
    raise DataError(
        f"{what} are a {type(images).__name__}; expected a uint8 tensor, a generation, a source, a "
        "cache, or the path of a folder, zip, .npz or cache"
    )


def _of_tensor(images: Tensor | np.ndarray, what: str) -> ImageSet:
    """uint8 (N, 3, H, W) tensors or (N, H, W, 3) arrays."""
    if isinstance(images, np.ndarray):
        axes = (0, 3, 1, 2) if images.ndim == 4 and images.shape[3] == 3 else None
        images = torch.from_numpy(np.ascontiguousarray(images.transpose(axes) if axes else images))
    _check(images, f"{what} tensor")
    content = blake3(images.cpu().contiguous().numpy().tobytes())
    content.update(str(tuple(images.shape)).encode())

    def batches(batch_size: int, first: int, stop: int) -> Iterator[Tensor]:
        yield from images[first:stop].split(batch_size)

    size = (images.shape[2], images.shape[3])
    return ImageSet("tensor", len(images), content.hexdigest()[:32], batches, None, size)


def _of_generation(generation: Generation, what: str) -> ImageSet:
    if generation.vae is None:
        raise DataError(f"{what} are latents without images: generate with decode=True")

    def batches(batch_size: int, first: int, stop: int) -> Iterator[Tensor]:
        if first == stop:
            return
        for samples in generation.rows(lambda i, _: first <= i < stop):
            assert samples.images is not None
            finite = torch.isfinite(samples.latents).flatten(1).all(1).tolist()
            if bad := [seed for seed, good in zip(samples.seeds, finite, strict=True) if not good]:
                raise NumericsError(
                    f"samples of seeds {', '.join(map(str, bad[:4]))} are not finite: the weights "
                    "have diverged, or guidance is too strong"
                )
            yield from samples.images.split(batch_size)

    # Images follow from the settings and these, so they are hashed before they are drawn.
    recipe = [generation.settings, generation.seeds, generation.labels]
    content = blake3(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    return ImageSet("generation", len(generation), content, batches, generation.settings)


def _of_npz(path: Path) -> ImageSet:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    _, height, width, _ = image_shape(path)
    count = sum(len(block) for block in read_images(path))  # reading checks the sums, too

    def batches(batch_size: int, first: int, stop: int) -> Iterator[Tensor]:
        for block in read_images(path, rows=batch_size, first=first, stop=stop):
            yield torch.from_numpy(block).permute(0, 3, 1, 2).contiguous()

    content = hash_file(path)[:32]
    return ImageSet(path.name, count, content, batches, read_settings(path), (height, width))


def _of_cache(cache: Cache, what: str) -> ImageSet:
    """The images that a cache was made of, where it stores them or encodes on the fly."""
    from erw.data.on_the_fly import Online

    name = Path(cache.where).name
    if not isinstance(cache, Online) and not cache.spec.images:
        raise CacheError(
            f"{what} {name}: this cache holds latents and features but no images; give "
            "the images themselves, or prepare them again with --images"
        )

    def batches(batch_size: int, first: int, stop: int) -> Iterator[Tensor]:
        for lo in range(first, stop, batch_size):
            yield cache.images(range(lo, min(lo + batch_size, stop)))

    size = (cache.image_size, cache.image_size)
    return ImageSet(name, len(cache), cache.identity, batches, None, size)


def _of_source(source: Source, path: Path | None = None) -> ImageSet:
    def image(i: int) -> np.ndarray:
        try:
            return source[i][0]
        except Unreadable as error:
            raise DataError(f"{where(source, i)}: {error}; mend or remove it") from error

    def batches(batch_size: int, first: int, stop: int) -> Iterator[Tensor]:
        for lo in range(first, stop, batch_size):
            rows = [image(i) for i in range(lo, min(lo + batch_size, stop))]
            for i, row in enumerate(rows, start=lo):
                if row.shape != shape:
                    raise DataError(
                        f"{where(source, i)} is {sides(row.shape[:2])}, the images before it "
                        f"{sides(shape[:2])}: bring them to one size first"
                    )
            yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()

    shape = image(0).shape if len(source) else (0, 0, 3)
    settings = read_settings(path) if path is not None and path.is_dir() else None
    return ImageSet(source.name, len(source), _content(source), batches, settings, shape[:2])


def _content(source: Source) -> str:
    """A source's fingerprint; files in a folder are hashed too, since it knows only their sizes.

    Raises DataError for a mix of grey and colour, or of opaque and transparent images: what the
    decoder makes of them would be scored.
    """
    digest = blake3(source.fingerprint().encode())
    if isinstance(source, FileSource):
        kinds: dict[str, int] = {}
        for i, key in enumerate(source.keys):
            try:
                data = source.files.read(key)
            except Unreadable as error:
                raise DataError(f"{source.where(i)}: {error}") from error
            if isinstance(source.files, Folder):
                digest.update(data)
            if (kind := channels(data)) is not None:
                kinds.setdefault(kind, i)
        if len(kinds) > 1:
            (one, i), (other, j), *_ = kinds.items()
            raise DataError(
                f"{source.where(i)} is {one}, {source.where(j)} is {other}: bring them to the same "
                "channels first, such as RGB"
            )
    return digest.hexdigest()[:32]


def _check(batch: Tensor, name: str) -> None:
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
        raise DataError(
            f"{name}: {str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}; "
            "expected uint8 (N, 3, H, W) with values 0..255"
        )
