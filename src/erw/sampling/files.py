"""Generated images on disk: a folder of PNGs, or the `.npz` that ADM's evaluator reads.

Both carry the settings and can be interrupted: run the same command again and only the missing
seeds are made. Under torchrun every rank makes its share. Memory does not grow with the number of
images.

    DIR/00000012.png        one image per seed; seed, label and evaluations in its text chunks
    DIR/settings.json       how the images were made

    FILE.npz                arr_0 (N, H, W, 3) uint8; labels, seeds, evaluations; settings (JSON)
    FILE.npz.parts/         finished seeds, until the file is whole
"""

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from erw.errors import DataError
from erw.sampling.generate import OPTIONS, Generation, Samples
from erw.sampling.png import png_path, png_text, read_png, replace_file, write_png

Progress = Callable[[int], None]
_SETTINGS = "settings.json"


def write(generation: Generation, out: str | Path, *, progress: Progress | None = None) -> Path:
    """Make what is missing of `generation` in `out`: a `.npz` file, or else a folder of PNGs.

    Args:
        progress: called with the number of images each time that some are on disk; first, if there
            are any, with those found there.

    Raises:
        DataError: repeated seeds, no images (no VAE), or `out` holds images of other settings.
    """
    out = Path(out)
    if len(set(generation.seeds)) != len(generation.seeds):
        raise DataError("a seed is given twice: files are named by seed, give each once")
    if generation.vae is None:
        raise DataError("these samples are latents without a VAE, so there are no images to write")
    single = out.suffix == ".npz"
    folder = out.with_name(f"{out.name}.parts") if single else out
    rank, world = _rank()
    if rank == 0:
        _claim(folder, generation.settings, made=out if single else None)
    _wait()
    if single and out.exists():
        if _same(out, generation):
            if rank == 0:
                shutil.rmtree(folder)
            return out
        if rank == 0:  # more seeds are asked for than last time: keep those that are made
            _unpack(out, folder)
        _wait()
    done = {seed for seed in generation.seeds if png_path(folder, seed).exists()}
    _check_labels(folder, generation, done)
    if progress and done and rank == 0:
        progress(len(done))
    for samples in generation.rows(lambda i, seed: seed not in done and i % world == rank):
        for seed, image, text in _each(samples):
            write_png(png_path(folder, seed), image, text)
        if progress:
            progress(len(samples.seeds))
    _wait()
    if single and rank == 0:
        _join(generation, folder, out)
        shutil.rmtree(folder)
    _wait()
    return out


def image_shape(path: str | Path) -> tuple[int, int, int, int]:
    """(N, H, W, 3) of `arr_0` in a `.npz`, from its header. Raises DataError as `read_images`."""
    with _images_in(path) as (_, shape):
        return shape


def read_images(
    path: str | Path, *, rows: int = 256, first: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Blocks (<= rows, H, W, 3) uint8 of images `first` to `stop` of a `.npz`, as a stream.

    Reading all of them checks the archive's checksum. Raises DataError when `arr_0` is something
    else, or is cut short.
    """
    with _images_in(path, direct=first > 0 or stop is not None) as (stream, shape):
        size = int(np.prod(shape[1:]))
        stream.seek(first * size, os.SEEK_CUR)
        stop = shape[0] if stop is None else stop
        for lo in range(first, stop, rows):
            count = min(rows, stop - lo)
            data = stream.read(count * size)
            yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *shape[1:])


@contextmanager
def _images_in(
    path: str | Path, *, direct: bool = False
) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    """The bytes of `arr_0`, from its first image on, and its shape.

    `direct` reads them from the file where they are not compressed: an archive's member reads all
    that it skips.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            shape, fortran, dtype = _header(stream)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
                raise DataError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3)")
            info = archive.getinfo("arr_0.npy")
            if not direct or info.compress_type != zipfile.ZIP_STORED:
                yield stream, shape
                return
            with Path(path).open("rb") as file:
                file.seek(info.header_offset + 26)  # lengths of the name and of what follows it
                name, extra = struct.unpack("<HH", file.read(4))
                file.seek(info.header_offset + 30 + name + extra + stream.tell())
                yield file, shape
    except KeyError:
        raise DataError(f"{path} has no images: expected an array arr_0 inside") from None
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or no .npz ({error}): make it again") from error


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """How the images in a folder or `.npz` of ours were made; None for images from elsewhere."""
    path = Path(path)
    if path.is_dir():
        file = path / _SETTINGS
        return json.loads(file.read_text("utf-8")) if file.exists() else None
    with np.load(path) as arrays:
        return json.loads(str(arrays["settings"])) if "settings" in arrays.files else None


def _claim(folder: Path, settings: dict[str, Any], *, made: Path | None) -> None:
    """Take `folder` for images of these settings, or go on with it; refuse another's."""
    owner, kept = folder, None
    if made is not None and made.exists():
        owner, kept = made, read_settings(made)
        if kept is None:
            raise DataError(f"{made} exists and was not written by erw: choose another file")
    elif (folder / _SETTINGS).exists():
        kept = read_settings(folder)
    elif folder.exists() and any(folder.glob("*.png")):
        raise DataError(f"{folder} holds images without {_SETTINGS}: choose an empty folder")
    # What an older erw did not tell cannot differ, but for what is told only where it has effect.
    told = kept or {}
    changed = [n for n, value in told.items() if n not in settings or settings[n] != value]
    if kept is not None:
        changed += [n for n in OPTIONS if n in settings and n not in told]
    if changed:
        name = changed[0]
        raise DataError(
            f"{owner} holds images of other settings: {name} was {told[name]}, now "
            f"{settings.get(name)}; choose another --out or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(
        folder / _SETTINGS, lambda file: file.write(json.dumps(settings, indent=1).encode())
    )


def _join(generation: Generation, folder: Path, out: Path) -> None:
    """All PNGs of `folder` into one `.npz`, in the order of the seeds, one image in memory."""
    seeds = generation.seeds
    first = read_png(png_path(folder, seeds[0]))
    small = {
        "seeds": np.asarray(seeds, np.int64),
        "settings": np.asarray(json.dumps(generation.settings)),
    }
    if generation.labels is not None:
        small["labels"] = np.asarray(generation.labels, np.int64)
    asked = [png_text(png_path(folder, seed), "evaluations") for seed in seeds]
    if None not in asked:  # images of older versions do not say it
        small["evaluations"] = np.asarray(asked, np.int64)

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False}
                shape = (len(seeds), *first.shape)
                np.lib.format.write_array_header_1_0(stream, {**header, "shape": shape})
                for seed in seeds:
                    stream.write(read_png(png_path(folder, seed)).tobytes())
            for name, value in small.items():
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, value, allow_pickle=False)

    replace_file(out, fill)


def _each(samples: Samples) -> Iterator[tuple[int, np.ndarray, dict[str, int]]]:
    """(seed, image (H, W, 3), its text) of a batch."""
    assert samples.images is not None
    images = samples.images.permute(0, 2, 3, 1).cpu().numpy()
    columns = {"seed": samples.seeds, "evaluations": samples.evaluations}
    if samples.labels is not None:
        columns["label"] = tuple(samples.labels.tolist())
    for i, (seed, image) in enumerate(zip(samples.seeds, images, strict=True)):
        yield seed, image, {name: column[i] for name, column in columns.items()}


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _same(path: Path, generation: Generation) -> bool:
    """Whether a whole `.npz` (of the same settings) has just these seeds and labels."""
    with np.load(path) as arrays:
        labels = tuple(arrays["labels"].tolist()) if "labels" in arrays.files else None
        return tuple(arrays["seeds"].tolist()) == generation.seeds and labels == generation.labels


def _unpack(path: Path, folder: Path) -> None:
    """The images of a `.npz` of ours as PNGs again."""
    names = {"seed": "seeds", "label": "labels", "evaluations": "evaluations"}
    with np.load(path) as arrays:
        columns = {k: arrays[v].tolist() for k, v in names.items() if v in arrays.files}
    images = (image for block in read_images(path) for image in block)
    for i, (seed, image) in enumerate(zip(columns["seed"], images, strict=True)):
        if not png_path(folder, seed).exists():
            text = {name: column[i] for name, column in columns.items()}
            write_png(png_path(folder, seed), image, text)


def _check_labels(folder: Path, generation: Generation, done: set[int]) -> None:
    """Other labels, given one by one, do not show in the settings: ask the images themselves."""
    if generation.labels is None or generation.label_rule != "given":
        return
    for seed, label in zip(generation.seeds, generation.labels, strict=True):
        if seed in done:
            made = png_text(png_path(folder, seed), "label")
            if made != str(label):
                raise DataError(
                    f"{png_path(folder, seed)} was made with label {made}, now {label} is asked "
                    "for; choose another --out or delete it"
                )


def _rank() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _wait() -> None:
    """All ranks arrive before any goes on."""
    if _rank()[1] > 1:
        flag = torch.zeros(1, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag)
