"""What can be scored, as uint8 batches: tensors, generations, files, caches.

A new kind of images is one function that is registered with `opened`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from erw.data.cache import Cache
from erw.data.sources import BUILT_IN, FileSource, Source, open_source
from erw.data.sources.openmoji import groups
from erw.encoders.base import check_images
from erw.errors import ConfigError, DataError, NumericsError, raised_as
from erw.io import hash_file
from erw.sampling.generation import Generation
from erw.sampling.save import read_images, read_settings

Reader = Callable[[int, int, int], Iterator[Tensor]]


@dataclass(frozen=True)
class ImageSet:
    """Images of one size (height, width); `read` gets the first image, the one to stop before, and
    the batch size. `content` is a hash of them, or of everything they follow from."""

    name: str
    count: int
    content: str
    resolution: tuple[int, int]
    read: Reader
    settings: dict[str, Any] | None = None

    def batches(self, batch_size: int, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), from image `first` to before `stop`, or to the end."""
        return self.read(first, self.count if stop is None else stop, batch_size)


Images = Tensor | Generation | Source | Cache | ImageSet | str | Path


def image_set(images: Images, *, what: str = "images", like: ImageSet | None = None) -> ImageSet:
    """Any of the accepted kinds of images as an `ImageSet`; `what` names them in messages.

    Raises DataError for fewer than 2 images, another dtype or shape, or a resolution other than
    that of `like`.
    """
    result = images if isinstance(images, ImageSet) else opened(images)
    if result.count < 2:
        raise DataError(f"{what} {result.name}: {result.count} of them; statistics need at least 2")
    if like and like.resolution != result.resolution:
        ours, others = _sides(like.resolution), _sides(result.resolution)
        problem = f"images {like.name} are {ours}, the {what} {result.name} is {others}"
        raise DataError(f"{problem}: bring both to one size first")
    return result


def reference_images(
    name: str | None, class_names: tuple[str, ...], *, size: int | None, count: int,
    missing: str = "--reference (--eval.reference) is missing: give images not trained on",
) -> Images:  # fmt: skip
    """The images to compare with: a path, or a built-in set composed at `size`.

    Without a name, runs on the built-in images, or some groups of them, are compared with the
    built-in test set of these. Raises ConfigError for other runs, saying what is missing;
    FileNotFoundError for no such path.
    """
    options: dict[str, Any] = {"size": size} if size else {}
    if name is None:
        if not class_names or class_names != tuple(g for g in groups() if g in class_names):
            raise ConfigError(missing)
        name, options["groups"] = "openmoji-test", class_names
    if name in BUILT_IN:
        return open_source(name, count=count, **options)
    if not Path(name).exists():
        raise FileNotFoundError(f"no reference at {name}: expected a folder, zip, .npz or cache")
    return name


def _sides(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _by_rows(rows: Callable[[range], Tensor]) -> Reader:
    """`ImageSet.read` from a function that gives the images of some numbers."""
    return lambda first, stop, batch_size: (
        rows(range(lo, min(lo + batch_size, stop))) for lo in range(first, stop, batch_size)
    )


@singledispatch
def opened(images: object) -> ImageSet:
    """The images as an `ImageSet`. Raises DataError for what cannot stand for images."""
    raise DataError(f"images are a {type(images).__name__}; expected a path or a uint8 tensor")


@opened.register
def _(images: Tensor) -> ImageSet:
    check_images(images)
    content = blake3(images.cpu().contiguous().numpy().tobytes())
    content.update(str(tuple(images.shape)).encode())
    read = _by_rows(lambda part: images[part.start : part.stop])
    size = (images.shape[2], images.shape[3])
    return ImageSet("tensor", len(images), content.hexdigest()[:32], size, read)


@opened.register
def _(generation: Generation) -> ImageSet:
    if generation.vae is None:
        raise DataError("samples are latents without images: generate with decode=True")

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for samples in generation.rows(range(first, stop)):
            assert samples.images is not None
            finite = torch.isfinite(samples.latents).flatten(1).all(1).tolist()
            if bad := [str(s) for s, good in zip(samples.seeds, finite, strict=True) if not good]:
                seeds = ", ".join(bad[:4])
                raise NumericsError(f"samples of seeds {seeds} are not finite: guide them less")
            yield from samples.images.split(batch_size)

    # Images follow from the settings and these, so they are hashed before they are drawn.
    recipe = [generation.settings, generation.seeds, generation.labels]
    content = blake3(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    height, width = (side * generation.vae.factor for side in generation.model.latent_shape[1:])
    size, settings = (height, width), generation.settings
    return ImageSet("generation", len(generation), content, size, read, settings)


@opened.register
def _(cache: Cache) -> ImageSet:
    name, size = Path(cache.address).name, (cache.image_size, cache.image_size)
    return ImageSet(name, len(cache), cache.identity, size, _by_rows(cache.images))


@opened.register(str)
@opened.register(Path)
def _(path: str | Path) -> ImageSet:
    path = Path(path)
    if any((path / f"{name}.json").is_file() for name in ("manifest", "prepare", "online")):
        return opened(Cache.open(path))
    if path.suffix != ".npz":
        source = open_source(path, classes="none")
        return _of_source(source, read_settings(path) if path.is_dir() else None)
    shapes = [block.shape for block in read_images(path)]  # reading checks the sums, too
    count, (height, width) = sum(n for n, *_ in shapes), shapes[0][1:3] if shapes else (0, 0)

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for block in read_images(path, rows=batch_size, first=first, stop=stop):
            yield torch.from_numpy(block).permute(0, 3, 1, 2).contiguous()

    size, content = (height, width), hash_file(path)[:32]
    return ImageSet(path.name, count, content, size, read, read_settings(path))


@opened.register(Source)
def _of_source(source: Source, settings: dict[str, Any] | None = None) -> ImageSet:
    """Decoded images of a source. Those in files are hashed: a source may know their sizes only."""

    def checked(read: Callable[[int], Any], i: int) -> Any:
        with raised_as(DataError, f"{source.location(i)} is unusable, mend or remove it"):
            return read(i)

    def rows(part: range) -> Tensor:
        images = [checked(source.__getitem__, i)[0] for i in part]
        for i, image in zip(part, images, strict=True):
            if image.shape != shape:
                other = f"{source.location(i)} is {_sides(image.shape)}"
                raise DataError(f"{other}, the images before it {_sides(shape)}: make all one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    content = blake3(source.fingerprint().encode())
    for i in range(len(source)) if isinstance(source, FileSource) else ():
        content.update(checked(source.read, i))
    shape = checked(source.__getitem__, 0)[0].shape
    name, count, hashed = source.name, len(source), content.hexdigest()[:32]
    return ImageSet(name, count, hashed, shape[:2], _by_rows(rows), settings)
