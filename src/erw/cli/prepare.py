"""`erw prepare`: images in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from erw import data
from erw.cli.settings import HELP, Settings, call, peek, required
from erw.errors import ConfigError

ADDED = ("features", "class_token", "batch_size")
"""Settings of an added encoder; the others are the cache's."""


@dataclass(frozen=True)
class Reading:
    """Which images of a source are read, and as which classes."""

    groups: tuple[str, ...] = ()  # classes of the built-in images, as flags food-drink; empty: all
    # Labels from dataset.json or folders (auto), folders, the innermost folder, or none.
    classes: Literal["auto", "folders", "leaf", "none"] = "auto"
    split: str | None = None  # train, test, ...: the folders or files of that name, or the hub's
    subset: str | None = None  # which configuration of a data set of the hub, if it has several
    columns: tuple[str, ...] = ()  # image and label column of tables, where they are unusual


READING = ("count", *(field.name for field in fields(Reading)))
"""Settings that say which images are read."""


def given(reading: dict[str, Any]) -> dict[str, Any]:
    """Options of `erw.data.open_source`, without those that say nothing."""
    return {name: value for name, value in reading.items() if value not in (None, ())}


@dataclass(frozen=True)
class Prepare(Reading):
    """How a cache is made."""

    # openmoji-f4c4, sd-vae-ft-ema, sdxl, sd3, flux, taesd, e2e-vavae, va-vae=FILE, a folder as
    # diffusers saves it, NAME=FOLDER for local weights, or none (plain pixels).
    vae: str = "openmoji-f4c4"
    # Whose patch features are stored: NAME, NAME@SIDE, NAME=FOLDER for local weights, or a folder
    # as transformers saves it; docs/data.md lists the names.
    encoders: tuple[str, ...] = ("efficientnet-lite0",)
    image_size: int = 64  # side of the cropped square
    count: int | None = None  # how many of the built-in images to compose; none: 50,000
    # How features are stored; int8 has one scale per token. None: as the cache has, else float16.
    features: Literal["float16", "bfloat16", "int8"] | None = None
    class_token: bool = False  # store the encoders' class tokens too, for REG and RCG
    flip: bool = False  # store the mirrored image as a second variant
    images: bool = False  # store the cropped images too, as a reference for evaluation
    rows_per_shard: int = 1024  # images per shard; what is lost at most if this is stopped
    batch_size: int = 64  # images encoded at once
    # bfloat16 encodes under autocast. None: float32, with --online bfloat16.
    precision: Literal["float32", "bfloat16"] | None = None
    seed: int = 0  # of the built-in images


def main(args: Sequence[str]) -> None:
    source, out = peek("prepare", _names, args)
    options, folder = Prepare(), Path(out or "").expanduser()
    if source and not HELP & set(args):
        from erw.data.sources import located

        located(source)  # before the cache is read, which imports torch
    spec = data.prepare.read_spec(folder) if out and folder.exists() else None
    if spec:  # the settings of the cache that --out names
        names = ("image_size", "flip", "images", "rows_per_shard", "precision", "seed")
        same: dict[str, Any] = {name: getattr(spec, name) for name in names}
        encoders = tuple(encoder.name for encoder in spec.encoders)
        count = spec.source.count if source in data.BUILT_IN else None
        options = Prepare(vae=spec.vae.name, encoders=encoders, count=count, **same)
    call("prepare", prepare, args, options=options, base=options)


def _names(source: Positional[str | None] = None, *, out: str | None = None) -> Any:
    return source, out


def prepare(
    options: Settings[Prepare],
    source: Annotated[Positional[str | None], arg(metavar="IMAGES")] = None,
    *,
    base: Prepare,
    out: str,
    add_encoder: tuple[str, ...] = (),
    verify: bool = False,
    online: bool = False,
    dry_run: bool = False,
) -> None:
    """Encode images into a cache; the same command resumes, and makes damaged shards again.

    The defaults are the settings of the cache in --out, if there is one.

    Args:
        source: a folder, zip or tar, WebDataset shards, Parquet, Arrow or NumPy files,
            hf:OWNER/NAME, a data set of the Hugging Face hub, or openmoji or openmoji-test, the
            built-in sets.
        out: folder of the cache.
        add_encoder: add features of these encoders to the cache, from the same IMAGES.
        verify: only recheck every hash of the cache.
        online: store nothing, encode in training.
        dry_run: only count images and bytes.
    """
    if verify:
        required(out)
        cache = data.prepare.verify(out)
        return print(f"{cache!r}: all {len(cache.manifest.shards)} shards are whole")
    if source is None:
        raise ConfigError("missing IMAGES, what to prepare; see erw prepare --help")
    settings = asdict(options)
    reading = given({name: settings.pop(name) for name in READING})
    if source in data.BUILT_IN:
        reading |= {"size": options.image_size, "seed": options.seed}
    images = data.open_source(source, **reading)
    from erw.dist import current

    device = str(current().device)
    if add_encoder:
        free = {name: getattr(base, name) for name in (*ADDED, *READING, "seed")}
        if replace(options, **free) != base or online or dry_run:
            taken = ", ".join(f"--{name.replace('_', '-')}" for name in ADDED)
            raise ConfigError(f"of an encoder's settings --add-encoder takes {taken} alone")
        added = {name: settings[name] for name in ADDED}
        return print(
            data.prepare.add_encoders(images, out, encoders=add_encoder, device=device, **added)
        )
    if online and not dry_run:
        same = ("vae", "encoders", "image_size", "flip", "seed", "class_token")
        reading |= {name: settings[name] for name in same}
        precision = options.precision or "bfloat16"
        return print(repr(data.on_the_fly.write(str(source), out, precision=precision, **reading)))
    settings |= {"device": device, "precision": options.precision or "float32"}
    make = data.prepare.estimate if dry_run else data.prepare.prepare
    print(make(images, out, **settings))
