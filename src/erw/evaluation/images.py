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
from erw.data.images import Unreadable, channels
from erw.data.sources import BUILT_IN, FileSource, Folder, Source, open_source
from erw.errors import CacheError, ConfigError, DataError, NumericsError
from erw.evaluation.published import REFERENCES, reference_batch
from erw.io import hash_file
from erw.sampling.generation import Generation, Samples
from erw.sampling.save import image_shape, read_images, read_settings


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, ready to be read.

    Attributes:
        name: for people, without folders of this machine.
        count: number of images.
        content: hash of the images, or of everything they follow from.
        resolution: (height, width).
        read: (first image, image to stop before, batch size) -> iterator over uint8 (B, 3, H, W).
        settings: how they were generated, where that is known.
    """

    name: str
    count: int
    content: str
    resolution: tuple[int, int]
    read: Callable[[int, int, int], Iterator[Tensor]]
    settings: dict[str, Any] | None = None

    def batches(self, batch_size: int, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """uint8 (B, 3, H, W), from image `first` to before `stop`, or to the end."""
        return self.read(first, self.count if stop is None else stop, batch_size)


Images = Tensor | np.ndarray | Samples | Generation | Source | Cache | ImageSet | str | Path


def image_set(images: Images, *, what: str = "images") -> ImageSet:
    """Any of the accepted kinds of images as an `ImageSet`; `what` names them in messages.

    Raises:
        DataError: fewer than 2 images, another dtype or shape, images of several sizes.
        CacheError: a cache without images.
        FileNotFoundError: nothing at the path.
    """
    opened = images if isinstance(images, ImageSet) else _open(images, what)
    if opened.count < 2:
        raise DataError(
            f"{what} {opened.name}: {opened.count} image{'' if opened.count == 1 else 's'}; "
            "statistics need at least 2"
        )
    return opened


def reference_images(
    name: str | None, class_names: tuple[str, ...], *, size: int | None, count: int
) -> Images:
    """The images to compare with: a path, a built-in set composed at `size`, or ADM's by name.

    Without a name, runs on the built-in images are compared with the built-in test set.

    Raises:
        ConfigError: no name, and the classes are not those of the built-in images.
        FileNotFoundError: nothing at the path.
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
        if name in REFERENCES:
            return reference_batch(name)
        raise FileNotFoundError(
            f"no reference at {name}: give a folder, zip, .npz, cache or statistics"
        )
    return name


def built_in(class_names: tuple[str, ...]) -> bool:
    """Whether these are the classes of the built-in images."""
    from erw.data.sources.openmoji import groups

    return class_names == tuple(groups())


def same_resolution(
    images: tuple[int, int], reference: tuple[int, int] | None, name: str, other: str
) -> None:
    """Raises DataError where (height, width) of the images and of the reference differ."""
    if reference is not None and images != reference:
        raise DataError(
            f"images {name} are {sides(images)}, {other} is {sides(reference)}: scores would "
            "compare sizes; bring both to one size first"
        )


def sides(resolution: tuple[int, ...]) -> str:
    """(height, width) as "width x height"."""
    return f"{resolution[1]} x {resolution[0]}"


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
        channels_last = images.ndim == 4 and images.shape[3] == 3
        images = images.transpose(0, 3, 1, 2) if channels_last else images
        images = torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(
            f"{what} tensor: {str(images.dtype).removeprefix('torch.')} of shape "
            f"{tuple(images.shape)}; expected uint8 (N, 3, H, W) with values 0..255"
        )
    content = blake3(images.cpu().contiguous().numpy().tobytes())
    content.update(str(tuple(images.shape)).encode())
    size = (images.shape[2], images.shape[3])

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        yield from images[first:stop].split(batch_size)

    return ImageSet("tensor", len(images), content.hexdigest()[:32], size, read)


def _of_generation(generation: Generation, what: str) -> ImageSet:
    if generation.vae is None:
        raise DataError(f"{what} are latents without images: generate with decode=True")

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
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
    _, height, width = generation.model.latent_shape
    size = (height * generation.vae.factor, width * generation.vae.factor)
    return ImageSet("generation", len(generation), content, size, read, generation.settings)


def _of_npz(path: Path) -> ImageSet:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    _, height, width, _ = image_shape(path)
    count = sum(len(block) for block in read_images(path))  # reading checks the sums, too

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for block in read_images(path, rows=batch_size, first=first, stop=stop):
            yield torch.from_numpy(block).permute(0, 3, 1, 2).contiguous()

    content = hash_file(path)[:32]
    return ImageSet(path.name, count, content, (height, width), read, read_settings(path))


def _of_cache(cache: Cache, what: str) -> ImageSet:
    """The images that a cache was made of, where it stores them or encodes on the fly."""
    from erw.data.on_the_fly import Online

    name = Path(cache.where).name
    if not isinstance(cache, Online) and not cache.spec.images:
        raise CacheError(
            f"{what} {name}: this cache holds latents and features but no images; give "
            "the images themselves, or prepare them again with --images"
        )

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for lo in range(first, stop, batch_size):
            yield cache.images(range(lo, min(lo + batch_size, stop)))

    size = (cache.image_size, cache.image_size)
    return ImageSet(name, len(cache), cache.identity, size, read)


def _of_source(source: Source, path: Path | None = None) -> ImageSet:
    def image(i: int) -> np.ndarray:
        try:
            return source[i][0]
        except Unreadable as error:
            raise DataError(f"{source.location(i)}: {error}; mend or remove it") from error

    def read(first: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        for lo in range(first, stop, batch_size):
            rows = [image(i) for i in range(lo, min(lo + batch_size, stop))]
            for i, row in enumerate(rows, start=lo):
                if row.shape != shape:
                    raise DataError(
                        f"{source.location(i)} is {sides(row.shape)}, the images before it "
                        f"{sides(shape)}: bring them to one size first"
                    )
            yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()

    shape = image(0).shape if len(source) else (0, 0, 3)
    settings = read_settings(path) if path is not None and path.is_dir() else None
    size = (shape[0], shape[1])
    return ImageSet(source.name, len(source), _content(source), size, read, settings)


def _content(source: Source) -> str:
    """A source's fingerprint; files in a folder are hashed too, since it knows only their sizes.

    Raises DataError for a mix of grey and colour, or of opaque and transparent images: what the
    decoder makes of them would be scored.
    """
    digest = blake3(source.fingerprint().encode())
    if isinstance(source, FileSource):
        kinds: dict[str, int] = {}
        for i in range(len(source)):
            try:
                data = source.read(i)
            except Unreadable as error:
                raise DataError(f"{source.location(i)}: {error}") from error
            if isinstance(source.files, Folder):
                digest.update(data)
            if (kind := channels(data)) is not None:
                kinds.setdefault(kind, i)
        if len(kinds) > 1:
            (one, i), (other, j), *_ = kinds.items()
            raise DataError(
                f"{source.location(i)} is {one}, {source.location(j)} is {other}: bring them to "
                "the same channels first, such as RGB"
            )
    return digest.hexdigest()[:32]
