"""What can be evaluated: tensors, generations, folders, zips, `.npz`, sources, as uint8 batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from erw.data.sources import FileSource, Source, open_source, where
from erw.errors import DataError
from erw.sample.files import read_images, read_settings
from erw.sample.generate import Generation, Samples

Images = Tensor | np.ndarray | Samples | Generation | Source | str | Path


@dataclass(frozen=True)
class ImageSet:
    """Images ready to be read.

    Attributes:
        name: for people, without folders of this machine.
        count: number of images.
        content: hash of the images, or of everything they follow from; "" where unknown.
        batches: batch size -> iterator over uint8 (B, 3, H, W), all of one size.
        settings: how they were generated, where that is known.
    """

    name: str
    count: int
    content: str
    batches: Callable[[int], Iterator[Tensor]]
    settings: dict[str, Any] | None = None


def image_set(images: Images, *, what: str = "images") -> ImageSet:
    """Any of the accepted kinds of images as an `ImageSet`; `what` names them in messages.

    Raises:
        DataError: fewer than 2 images, another dtype or shape, images of several sizes.
        FileNotFoundError: nothing at the path.
    """
    found = _open(images, what)
    if found.count < 2:
        raise DataError(f"{what} {found.name}: {found.count} image; statistics need at least 2")

    def checked(batch_size: int) -> Iterator[Tensor]:
        first: torch.Size | None = None
        for batch in found.batches(batch_size):
            _check(batch, found.name, what)
            first = first or batch.shape[2:]
            if batch.shape[2:] != first:
                raise DataError(f"{what} {found.name}: {_side(batch)} after {_side(first)} images")
            yield batch

    return ImageSet(found.name, found.count, found.content, checked, found.settings)


def _open(images: Images, what: str) -> ImageSet:
    if isinstance(images, Samples):
        if images.images is None:
            raise DataError(f"{what} are latents without images: generate with a VAE")
        images = images.images
    if isinstance(images, Tensor | np.ndarray):
        return _of_tensor(images, what)
    if isinstance(images, Generation):
        return _of_generation(images, what)
    if isinstance(images, str | Path) and str(images).endswith(".npz"):
        return _of_npz(Path(images))
    if isinstance(images, str | Path):
        return _of_source(open_source(images, classes="none"), path=Path(images))
    if hasattr(images, "fingerprint"):
        return _of_source(images)
    raise DataError(
        f"{what} are a {type(images).__name__}; expected a uint8 tensor, a generation, a source, "
        "or the path of a folder, zip or .npz"
    )


def _of_tensor(images: Tensor | np.ndarray, what: str) -> ImageSet:
    """uint8 (N, 3, H, W) tensors or (N, H, W, 3) arrays."""
    if isinstance(images, np.ndarray):
        if images.ndim == 4 and images.shape[3] == 3:
            images = images.transpose(0, 3, 1, 2)
        images = torch.from_numpy(np.ascontiguousarray(images))
    _check(images, "tensor", what)
    content = blake3(images.cpu().contiguous().numpy().tobytes())
    content.update(str(tuple(images.shape)).encode())
    return ImageSet("tensor", len(images), content.hexdigest()[:32], images.split)


def _of_generation(generation: Generation, what: str) -> ImageSet:
    if generation.vae is None:
        raise DataError(f"{what} are latents without images: generate with decode=True")

    def batches(batch_size: int) -> Iterator[Tensor]:
        for samples in generation:
            assert samples.images is not None
            yield from samples.images.split(batch_size)

    # Its content is not hashed: it is cheaper to score it than to draw it twice.
    return ImageSet("generation", len(generation), "", batches, generation.settings)


def _of_npz(path: Path) -> ImageSet:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    count = sum(len(block) for block in read_images(path))
    content = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()[:32]

    def batches(batch_size: int) -> Iterator[Tensor]:
        for block in read_images(path, rows=batch_size):
            yield torch.from_numpy(block).permute(0, 3, 1, 2).contiguous()

    return ImageSet(path.name, count, content, batches, read_settings(path))


def _of_source(source: Source, path: Path | None = None) -> ImageSet:
    def batches(batch_size: int) -> Iterator[Tensor]:
        rows: list[np.ndarray] = []
        for i in range(len(source)):
            image, _ = source[i]
            if rows and image.shape != rows[0].shape:
                raise DataError(
                    f"{where(source, i)} is {image.shape[1]} x {image.shape[0]}, the images before "
                    f"it {rows[0].shape[1]} x {rows[0].shape[0]}: bring them to one size first"
                )
            rows.append(image)
            if len(rows) == batch_size or i == len(source) - 1:
                yield torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()
                rows = []

    settings = read_settings(path) if path is not None and path.is_dir() else None
    return ImageSet(source.name, len(source), _content(source), batches, settings)


def _content(source: Source) -> str:
    """A source's fingerprint; files in a folder are hashed too, since it knows sizes only."""
    digest = blake3(source.fingerprint().encode())
    if isinstance(source, FileSource):
        for i in range(len(source)):
            file = Path(source.where(i))
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _check(batch: Tensor, name: str, what: str) -> None:
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1] != 3:
        raise DataError(
            f"{what} {name}: {str(batch.dtype).removeprefix('torch.')} of shape "
            f"{tuple(batch.shape)}; expected uint8 (N, 3, H, W) with values 0..255"
        )


def _side(of: Tensor | torch.Size) -> str:
    height, width = (of.shape if isinstance(of, Tensor) else of)[-2:]
    return f"{width} x {height}"
