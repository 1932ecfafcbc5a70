"""Generated images on disk: a folder of PNGs, or the `.npz` that ADM's evaluator reads.

The same command makes the missing seeds only; under torchrun every rank makes its share.

    DIR/00000012.png        one image per seed; its label in a text chunk
    DIR/settings.json       how the images were made
    FILE.npz                arr_0 (N, H, W, 3) uint8; labels, seeds; settings (JSON)
    FILE.npz.parts/         finished images as a folder, until the file is complete
"""

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from erw.data.images import EXTENSIONS
from erw.data.sources import files
from erw.data.sources.labels import ending
from erw.dist import current
from erw.errors import DataError, raised_as
from erw.io import opened_npz, read_json, replacing, write_json
from erw.sampling.generation import Generation

SETTINGS = "settings.json"
OURS = re.compile(r"\d{8,}\.png")


def write(
    generation: Generation, out: str | Path, *, progress: Callable[[int], Any] | None = None
) -> Path:
    """Make the missing images of `generation` in `out`: a `.npz` file, or else a folder of PNGs.

    `progress` is called with the number of images that are newly on disk. Raises DataError for
    repeated seeds, no VAE, or an `out` with images of other settings.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    out, world = Path(out), current()
    if len(set(generation.seeds)) != len(generation.seeds):
        raise DataError("a seed is given twice: files are named by seed, give each once")
    if out.is_file() and out.suffix != ".npz":
        raise DataError(f"{out} is a file: choose another --out, a folder or FILE.npz")
    if generation.vae is None:
        raise DataError("these samples are latents: there are no images to write")
    single = out.suffix == ".npz"
    folder = out.with_name(f"{out.name}.parts") if single else out
    if world.broadcast(lambda: _prepare(generation, folder, out if single else None)):
        return out
    done = {seed for seed in generation.seeds if png_path(folder, seed).exists()}
    labels = dict(zip(generation.seeds, generation.labels or (), strict=False))
    for seed in done if generation.label_rule == "given" else ():  # settings do not have these
        if (old := read_png(png_path(folder, seed))[1].get("label")) != str(labels[seed]):
            raise DataError(f"{folder}: seed {seed} has label {old}, now it is {labels[seed]}")
    if progress and world.first:
        progress(len(done))
    share = range(world.rank, len(generation), world.size)
    for samples in generation.rows([i for i in share if generation.seeds[i] not in done]):
        assert samples.images is not None, "it has a VAE"
        for i, seed in enumerate(samples.seeds):
            info = PngInfo()
            info.add_text("label", str(labels.get(seed, "none")))
            image = Image.fromarray(samples.images[i].permute(1, 2, 0).cpu().numpy())
            with replacing(png_path(folder, seed), sync=False) as tmp:
                image.save(tmp, format="PNG", pnginfo=info, compress_level=1)
        if progress:
            progress(len(samples.seeds))
    world.barrier()
    if single and world.first:
        _join(generation, folder, out)
        shutil.rmtree(folder)
    world.barrier()
    return out


def read_images(
    path: str | Path, *, rows: int = 256, first: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Blocks (<= rows, H, W, 3) uint8 of images `first` to `stop` of a `.npz`, as a stream.

    Reading to the end checks the archive's checksum. Raises DataError when damaged.
    """
    problem = f"{path} is damaged or no .npz of images"
    with (
        Path(path).open("rb") as file,
        raised_as(DataError, problem),
        zipfile.ZipFile(file) as archive,
        archive.open("arr_0.npy") as stream,
    ):
        version = np.lib.format.read_magic(stream)[0]
        read_header = getattr(np.lib.format, f"read_array_header_{version}_0")
        shape, fortran, dtype = read_header(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            actual = f"{dtype} {shape}" + " in Fortran order" * fortran
            raise ValueError(f"arr_0 is {actual}; expected uint8 (N, H, W, 3) in C order")
        size, end = math.prod(shape[1:]), shape[0] if stop is None else stop
        stream.seek(first * size, os.SEEK_CUR)
        for lo in range(first, end, rows):
            data = bytearray(stream.read(min(rows, end - lo) * size))
            yield np.frombuffer(data, np.uint8).reshape(min(rows, end - lo), *shape[1:])


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """How the images in a folder or `.npz` of ours were made; None for images from elsewhere.

    Raises DataError for settings that cannot be read, or of which some of the images are not.
    """
    path, settings = Path(path), None
    if path.is_dir():
        settings = read_json(file) if (file := path / SETTINGS).exists() else {}
    else:
        with opened_npz(path) as arrays:
            if "settings" in arrays:
                settings = json.loads(str(arrays["settings"]))
    if not isinstance(settings, dict) or not settings.keys() >= {"solver", "weights"}:
        return None  # of another program
    if others := [x for x in _images(path) if not OURS.fullmatch(x)]:
        problem = f"{path} holds images that erw did not write, such as {others[0]}"
        raise DataError(f"{problem}: take them out, or choose another folder")
    return settings


def _images(path: Path) -> list[str]:
    """The images that evaluation would read from a folder, those in folders inside it too."""
    entries = files.folder(path).entries if path.is_dir() else ()
    return [key for key in entries if ending(key) in EXTENSIONS]


def png_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:08d}.png"


def read_png(path: Path) -> tuple[np.ndarray, dict[Any, Any]]:
    from PIL import Image

    problem = f"{path} is damaged: remove it, and it is drawn again"
    with raised_as(DataError, problem), Image.open(path) as image:
        return np.asarray(image.convert("RGB")), image.info


def _prepare(generation: Generation, folder: Path, file: Path | None) -> bool:
    """Claim `folder` for these settings; True if `file`, the `.npz`, is complete already."""
    settings = json.loads(json.dumps(generation.settings))
    owner = file if file and file.exists() else folder
    old = read_settings(owner) if owner.exists() else None
    if old is None and (owner == file or (folder / SETTINGS).exists() or _images(folder)):
        problem = f"{owner} holds images or settings that erw did not write"
        raise DataError(f"{problem}: choose another --out")
    old = old or settings
    for name in settings | old:
        if (was := old.get(name)) != (now := settings.get(name)):
            problem = f"{owner}: {name} was {was!s:.80}, now {now}"
            raise DataError(f"{problem}; choose another --out")
    if owner == folder:
        write_json(folder / SETTINGS, settings)
        return False
    with opened_npz(owner) as arrays:
        held = {name: arrays[name].tolist() for name in ("seeds", "labels") if name in arrays}
    for name, values in _ids(generation).items():
        if held.get(name) != list(values):
            raise DataError(f"{file} holds other {name}; choose another --out")
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _ids(generation: Generation) -> dict[str, tuple[int, ...]]:
    labels = {"labels": generation.labels} if generation.labels else {}
    return {"seeds": generation.seeds, **labels}


def _join(generation: Generation, folder: Path, out: Path) -> None:
    """The PNGs of `folder` as one `.npz` in the order of the seeds, through a file on disk."""
    shape = len(generation), *read_png(png_path(folder, generation.seeds[0]))[0].shape
    images = np.lib.format.open_memmap(folder / "arr_0.npy", "w+", np.uint8, shape)
    for i, seed in enumerate(generation.seeds):
        images[i], _ = read_png(png_path(folder, seed))
    arrays: dict[str, Any] = {**_ids(generation), "settings": json.dumps(generation.settings)}
    with replacing(out) as tmp, open(tmp, "wb") as file:
        np.savez(file, arr_0=images, **arrays)
