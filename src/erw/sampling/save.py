"""Generated images on disk: a folder of PNGs, or the `.npz` that ADM's evaluator reads.

Both hold their settings and survive interruption: the same command makes the missing seeds only.
Under torchrun every rank makes its share. Memory does not grow with the number of images.

    DIR/00000012.png        one image per seed; seed, label and evaluations in its text chunks
    DIR/settings.json       how the images were made

    FILE.npz                arr_0 (N, H, W, 3) uint8; labels, seeds, evaluations; settings (JSON)
    FILE.npz.parts/         finished images as a folder, until the file is complete
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from erw.dist import current
from erw.errors import DataError
from erw.io import write_file, write_json
from erw.sampling.generation import Generation

_SETTINGS = "settings.json"


def write(
    generation: Generation, out: str | Path, *, progress: Callable[[int], Any] | None = None
) -> Path:
    """Make the missing images of `generation` in `out`: a `.npz` file, or else a folder of PNGs.

    Args:
        progress: called with the number of images that are newly on disk, first with those that
            were there already (on the first rank).

    Raises:
        DataError: repeated seeds, no VAE, or `out` has images of other settings.
    """
    out, world = Path(out), current()
    if len(set(generation.seeds)) != len(generation.seeds):
        raise DataError("a seed is given twice: files are named by seed, give each once")
    if generation.vae is None:
        raise DataError("these samples are latents without a VAE, so there are no images to write")
    single = out.suffix == ".npz"
    folder = out.with_name(f"{out.name}.parts") if single else out
    if world.broadcast(lambda: _prepare(generation, folder, out if single else None)):
        return out
    done = {seed for seed in generation.seeds if png_path(folder, seed).exists()}
    _check_labels(folder, generation, done)
    if progress and done and world.first:
        progress(len(done))
    rest = generation.rows(lambda i, seed: seed not in done and i % world.size == world.rank)
    for samples in rest:
        assert samples.images is not None, "it has a VAE"
        texts: dict[str, Any] = {"seed": samples.seeds, "evaluations": samples.evaluations}
        if samples.labels is not None:
            texts["label"] = samples.labels.tolist()
        for i, image in enumerate(samples.images.permute(0, 2, 3, 1).cpu().numpy()):
            path = png_path(folder, samples.seeds[i])
            _write_png(path, image, {name: values[i] for name, values in texts.items()})
        if progress:
            progress(len(samples.seeds))
    world.barrier()
    if single and world.first:
        _join(generation, folder, out)
        shutil.rmtree(folder)
    world.barrier()
    return out


def image_shape(path: str | Path) -> tuple[int, int, int, int]:
    """(N, H, W, 3) of `arr_0` in a `.npz`, from its header. Raises DataError as `read_images`."""
    with _images_in(path) as (_, shape):
        return shape


def read_images(
    path: str | Path, *, rows: int = 256, first: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Blocks (<= rows, H, W, 3) uint8 of images `first` to `stop` of a `.npz`, as a stream.

    Reading to the end checks the archive's checksum. Raises DataError when `arr_0` is something
    else or is cut short.
    """
    with _images_in(path) as (stream, shape):
        size = int(np.prod(shape[1:]))
        stream.seek(first * size, os.SEEK_CUR)
        stop = shape[0] if stop is None else stop
        for lo in range(first, stop, rows):
            count = min(rows, stop - lo)
            data = stream.read(count * size)
            yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])


@contextmanager
def _images_in(path: str | Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    """The bytes of `arr_0`, from its first image on, and its shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            version = np.lib.format.read_magic(stream)[0]
            read_header = getattr(np.lib.format, f"read_array_header_{version}_0")
            shape, fortran, dtype = read_header(stream)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
                raise DataError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3)")
            yield stream, shape
    except KeyError:
        raise DataError(f"{path} has no images: expected an array arr_0 inside") from None
    except DataError:
        raise
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged or no .npz ({error}): make it again") from error


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """How the images in a folder or `.npz` of ours were made; None for images from elsewhere."""
    path = Path(path)
    if path.is_dir():
        file = path / _SETTINGS
        return json.loads(file.read_text("utf-8")) if file.exists() else None
    with np.load(path) as arrays:
        return json.loads(str(arrays["settings"])) if "settings" in arrays.files else None


def png_path(folder: Path, seed: int) -> Path:
    """The file of a seed's image."""
    return folder / f"{seed:08d}.png"


def read_png(path: Path) -> np.ndarray:
    """The image (H, W, 3) uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _png_text(path: Path, name: str) -> str | None:
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(name)


def _write_png(path: Path, image: np.ndarray, texts: Mapping[str, int]) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    for name, value in texts.items():
        info.add_text(name, str(value))
    picture = Image.fromarray(np.ascontiguousarray(image))
    options: dict[str, Any] = {"format": "PNG", "pnginfo": info, "compress_level": 1}
    write_file(path, lambda file: picture.save(file, **options), sync=False)


def _prepare(generation: Generation, folder: Path, file: Path | None) -> bool:
    """Claim `folder` for these settings; True if `file`, the `.npz`, is complete already."""
    settings = json.loads(json.dumps(generation.settings))
    owner = file if file is not None and file.exists() else folder
    old = read_settings(owner) if owner.exists() else None
    if old is None and owner == file:
        raise DataError(f"{file} exists and was not written by erw: choose another file")
    if old is None and any(folder.glob("*.png")):
        raise DataError(f"{folder} holds images without {_SETTINGS}: choose an empty folder")
    old = settings if old is None else old
    if changed := [name for name in settings | old if old.get(name) != settings.get(name)]:
        raise DataError(
            f"{owner} holds images of other settings: {changed[0]} was {old.get(changed[0])}, now "
            f"{settings.get(changed[0])}; choose another --out or delete it"
        )
    if owner == folder:
        write_json(folder / _SETTINGS, settings)
        return False
    with np.load(owner) as arrays:
        labels = tuple(arrays["labels"].tolist()) if "labels" in arrays.files else None
        if (tuple(arrays["seeds"].tolist()), labels) != (generation.seeds, generation.labels):
            raise DataError(f"{file} holds other seeds or labels; choose another --out")
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _join(generation: Generation, folder: Path, out: Path) -> None:
    """The PNGs of `folder` as one `.npz` in the order of the seeds, one image in memory."""
    paths = [png_path(folder, seed) for seed in generation.seeds]
    arrays = {
        "seeds": np.asarray(generation.seeds, np.int64),
        "evaluations": np.asarray([_png_text(path, "evaluations") for path in paths], np.int64),
        "settings": np.asarray(json.dumps(generation.settings)),
    }
    if generation.labels is not None:
        arrays["labels"] = np.asarray(generation.labels, np.int64)
    shape = (len(paths), *read_png(paths[0]).shape)

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for path in paths:
                    stream.write(read_png(path).tobytes())
            for name, value in arrays.items():
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, value)

    write_file(out, fill)


def _check_labels(folder: Path, generation: Generation, done: set[int]) -> None:
    """Labels given one by one are not part of the settings: compare with those in the images."""
    if generation.labels is None or generation.label_rule != "given":
        return
    for seed, label in zip(generation.seeds, generation.labels, strict=True):
        path = png_path(folder, seed)
        if seed in done and (old := _png_text(path, "label")) != str(label):
            raise DataError(
                f"{path} was made with label {old}, now it is {label}; choose another --out or "
                "delete it"
            )
