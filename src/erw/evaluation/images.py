"""What can be scored, as uint8 batches: tensors, generations, files, caches."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from erw.data.cache import Cache
from erw.data.images import Unreadable
from erw.data.sources import BUILT_IN, FileSource, Source, open_source
from erw.errors import ConfigError, DataError, NumericsError
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


def image_set(images: Images, *, what: str = "images") -> ImageSet:
    """Any of the accepted kinds of images as an `ImageSet`; `what` names them in messages.

    Raises DataError for fewer than 2 images or another dtype or shape.
    """
    opened = images if isinstance(images, ImageSet) else _open(images, what)
    if opened.count < 2:
        raise DataError(f"{what} {opened.name}: {opened.count} of them; statistics need at least 2")
    return opened


def reference_images(
    name: str | None, class_names: tuple[str, ...], *, size: int | None, count: int
) -> Images:
    """The images to compare with: a path, or a built-in set composed at `size`.

    Without a name, runs on the built-in images are compared with the built-in test set. Raises
    ConfigError for other runs, FileNotFoundError where nothing is at the path.
    """
    if name is None:
        if not built_in(class_names):
            raise ConfigError(
                "--reference (--eval.reference while training) is missing: give images that were "
                "not trained on (a folder, zip, .npz, cache with images or openmoji-test)"
            )
        name = "openmoji-test"
    if name in BUILT_IN:
        options: dict[str, Any] = {"size": size} if size else {}
        return open_source(name, count=count, **options)
    if not Path(name).exists():
        raise FileNotFoundError(f"no reference at {name}: expected a folder, zip, .npz or cache")
    return name


def built_in(class_names: tuple[str, ...]) -> bool:
    """Whether these are the classes of the built-in images."""
    from erw.data.sources.openmoji import groups

    return class_names == tuple(groups())


def same_resolution(images: ImageSet, other: ImageSet, what: str) -> None:
    """Raises DataError where the resolutions of both sets differ."""
    if images.resolution != other.resolution:
        raise DataError(
            f"images {images.name} are {_sides(images.resolution)}, the {what} {other.name} is "
            f"{_sides(other.resolution)}: bring both to one size first"
        )


def _sides(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _open(images: Images, what: str) -> ImageSet:
    if isinstance(images, Tensor):
        return _of_tensor(images, what)
    if isinstance(images, Generation):
        return _of_generation(images, what)
    if isinstance(images, Cache):
        return _of_cache(images)
    if isinstance(images, Source):
        return _of_source(images)
    if not isinstance(images, str | Path):
        raise DataError(f"{what} are a {type(images).__name__}; expected a path or a uint8 tensor")
    path = Path(images)
    if path.suffix == ".npz":
        return _of_npz(path)
    if any((path / f"{name}.json").is_file() for name in ("manifest", "prepare", "online")):
        return _of_cache(Cache.open(path))
    source = open_source(path, classes="none")
    return _of_source(source, read_settings(path) if path.is_dir() else None)


def _by_rows(rows: Callable[[int, int], Tensor]) -> Reader:
    """`ImageSet.read` from a function that gives the images `lo` to `hi`."""

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for lo in range(first, stop, batch_size):
            yield rows(lo, min(lo + batch_size, stop))

    return read


def _of_tensor(images: Tensor, what: str) -> ImageSet:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"{what} are {images.dtype} {tuple(images.shape)}; expected uint8 (N, 3, H, W)"
        )
    content = blake3(images.cpu().contiguous().numpy().tobytes())
    content.update(str(tuple(images.shape)).encode())
    read = _by_rows(lambda lo, hi: images[lo:hi])
    size = (images.shape[2], images.shape[3])
    return ImageSet("tensor", len(images), content.hexdigest()[:32], size, read)


def _of_generation(generation: Generation, what: str) -> ImageSet:
    if generation.vae is None:
        raise DataError(f"{what} are latents without images: generate with decode=True")

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for samples in generation.rows(range(first, stop)):
            assert samples.images is not None
            finite = torch.isfinite(samples.latents).flatten(1).all(1).tolist()
            if bad := [str(s) for s, good in zip(samples.seeds, finite, strict=True) if not good]:
                raise NumericsError(
                    f"samples of seeds {', '.join(bad[:4])} are not finite: the weights have "
                    "diverged, or guidance is too strong"
                )
            yield from samples.images.split(batch_size)

    # Images follow from the settings and these, so they are hashed before they are drawn.
    recipe = [generation.settings, generation.seeds, generation.labels]
    content = blake3(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    height, width = (side * generation.vae.factor for side in generation.model.latent_shape[1:])
    settings = generation.settings
    return ImageSet("generation", len(generation), content, (height, width), read, settings)


def _of_npz(path: Path) -> ImageSet:
    shapes = [block.shape for block in read_images(path)]  # reading checks the sums, too
    count, (height, width) = sum(n for n, *_ in shapes), shapes[0][1:3] if shapes else (0, 0)

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for block in read_images(path, rows=batch_size, first=first, stop=stop):
            yield torch.from_numpy(block).permute(0, 3, 1, 2).contiguous()

    content = hash_file(path)[:32]
    return ImageSet(path.name, count, content, (height, width), read, read_settings(path))


def _of_cache(cache: Cache) -> ImageSet:
    read = _by_rows(lambda lo, hi: cache.images(range(lo, hi)))
    size = (cache.image_size, cache.image_size)
    return ImageSet(Path(cache.where).name, len(cache), cache.identity, size, read)


def _of_source(source: Source, settings: dict[str, Any] | None = None) -> ImageSet:
    """Decoded images of a source. Those in files are hashed: a source may know their sizes only."""

    def checked(read: Callable[[int], Any], i: int) -> Any:
        try:
            return read(i)
        except Unreadable as error:
            raise DataError(f"{source.location(i)}: {error}; mend or remove it") from error

    def rows(lo: int, hi: int) -> Tensor:
        images = [checked(source.__getitem__, i)[0] for i in range(lo, hi)]
        for i, image in enumerate(images, start=lo):
            if image.shape != shape:
                raise DataError(
                    f"{source.location(i)} is {_sides(image.shape)}, the images before it "
                    f"{_sides(shape)}: bring them to one size first"
                )
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    content = blake3(source.fingerprint().encode())
    for i in range(len(source)) if isinstance(source, FileSource) else ():
        content.update(checked(source.read, i))
    shape = checked(source.__getitem__, 0)[0].shape
    name, count, hashed = source.name, len(source), content.hexdigest()[:32]
    return ImageSet(name, count, hashed, shape[:2], _by_rows(rows), settings)
