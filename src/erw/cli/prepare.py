"""`erw prepare`: images in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Positional, arg

from erw.cli.settings import Settings, call, peek
from erw.data import on_the_fly
from erw.data.prepare import add_encoders, estimate, read_spec
from erw.data.prepare import prepare as encode
from erw.data.prepare import verify as recheck
from erw.data.sources import BUILT_IN, Source, open_source
from erw.errors import ConfigError

READING = ("classes", "split", "subset", "columns")
"""Settings that say how images are found in IMAGES."""
ADDED = ("features", "class_token", "batch_size", "workers", "device", "count", "seed", "groups")
"""Settings that --add-encoder takes; the rest is as the cache has it."""


@dataclass(frozen=True)
class Prepare:
    """How a cache is made.

    Attributes:
        vae: openmoji-f4c4, sd-vae-ft-ema, sdxl, sd3, flux, taesd, e2e-vavae, va-vae=FILE, a folder
            as diffusers saves it, NAME=FOLDER for local weights, or none (plain pixels).
        encoders: whose patch features are stored: NAME, NAME@SIDE, NAME=FOLDER for local weights,
            or a folder as transformers saves it; docs/data.md lists the names.
        image_size: side of the cropped square.
        count: how many of the built-in images to compose (50,000); others are taken whole.
        groups: which classes of the built-in images, such as flags food-drink; empty: all 9.
        classes: labels from dataset.json or folders (auto), folders, the innermost folder, or none.
        split: which part of a data set of the hub, or of a folder in its layout, such as train.
        subset: which of its configurations, if it has several.
        columns: names of the image and the label column of tables, where they are unusual.
        crop: adm (centre, as ADM does), random, or resize.
        features: how features are stored; int8 has one scale per token. None: as the cache has
            them, else float16.
        class_token: store the encoders' class tokens too, for REG and RCG.
        flip: store the mirrored image as a second variant.
        images: store the cropped images too, as a reference for evaluation.
        rows_per_shard: images per shard; what is lost at most if this is stopped.
        batch_size: images encoded at once.
        precision: bfloat16 encodes under autocast. None: float32, with --online bfloat16.
        seed: moves random crops, and the built-in images.
        workers: threads that decode and crop; none: one per core, 8 at most.
        device: where the encoders run; auto: a GPU if there is one.
        strict: stop at the first unreadable image instead of listing it in rejected.jsonl.
    """

    vae: str = "openmoji-f4c4"
    encoders: tuple[str, ...] = ("efficientnet-lite0",)
    image_size: int = 64
    count: int | None = None
    groups: tuple[str, ...] = ()
    classes: Literal["auto", "folders", "leaf", "none"] = "auto"
    split: str | None = None
    subset: str | None = None
    columns: tuple[str, ...] = ()
    crop: Literal["adm", "random", "resize"] = "adm"
    features: Literal["float16", "bfloat16", "int8"] | None = None
    class_token: bool = False
    flip: bool = False
    images: bool = False
    rows_per_shard: int = 1024
    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] | None = None
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    strict: bool = False


def main(args: Sequence[str]) -> None:
    how = defaults(args)
    call("prepare", prepare, args, {"base": how}, how=how)


def defaults(args: Sequence[str]) -> Prepare:
    """The settings of the cache that --out names, where there is one."""
    source, out = peek("prepare", _names, args)
    if not out or not (spec := read_spec(Path(out).expanduser())):
        return Prepare()
    same = ("image_size", "crop", "flip", "images", "rows_per_shard", "precision", "seed")
    how = Prepare(
        vae=spec.vae.name,
        encoders=tuple(encoder.name for encoder in spec.encoders),
        **{name: getattr(spec, name) for name in same},
    )
    return replace(how, count=spec.source.count) if source in BUILT_IN else how


def _names(source: Positional[str | None] = None, *, out: str | None = None) -> Any:
    return source, out


def prepare(
    how: Settings[Prepare],
    base: Prepare,
    source: Annotated[Positional[str | None], arg(metavar="IMAGES")] = None,
    *,
    out: str,
    add_encoder: tuple[str, ...] = (),
    verify: bool = False,
    online: bool = False,
    dry_run: bool = False,
) -> None:
    """Encode images into a cache; the same command resumes, and makes damaged shards again.

    Args:
        how: settings; the defaults are those of the cache in --out, if there is one.
        source: a folder, zip or tar, WebDataset shards, Parquet, Arrow or NumPy files,
            hf:OWNER/NAME, a data set of the Hugging Face hub, or openmoji or openmoji-test, the
            built-in sets.
        out: folder of the cache.
        add_encoder: add features of these encoders to the cache, from the same IMAGES or those
            that it stores.
        verify: only recheck every hash of the cache.
        online: store nothing, encode in training.
        dry_run: only count images and bytes.
    """
    if verify:
        cache = recheck(out)
        print(f"{cache!r}: all {len(cache.manifest.shards)} shards are whole")
        return
    if source is None and not add_encoder:
        raise ConfigError("missing IMAGES, what to prepare; see erw prepare --help")
    device = pick_device(how.device)
    images = None if source is None else open_images(source, how)
    if add_encoder:
        changed = {name for name, value in asdict(how).items() if value != getattr(base, name)}
        for name in (
            sorted(changed - {*ADDED, *READING}) + ["online"] * online + ["dry-run"] * dry_run
        ):
            name = name.replace("_", "-")
            raise ConfigError(f"--{name} does not go with --add-encoder: leave it out")
        options = {name: getattr(how, name) for name in ADDED[:4]}
        print(add_encoders(images, out, encoders=add_encoder, device=device, **options))
        return
    assert images is not None
    composing = ("count", "groups", *READING)  # the source has taken them
    options = {name: value for name, value in asdict(how).items() if name not in composing}
    options |= {"device": device, "precision": how.precision or "float32"}
    if dry_run:
        print(estimate(images, out, **options))
    elif online:
        print(repr(_online(str(source), out, how)))
    else:
        print(encode(images, out, **options))


def open_images(source: str, how: Prepare) -> Source:
    """The images named; the built-in ones are composed at the size asked for."""
    if source in BUILT_IN:
        return open_source(source, **_composing(how), seed=how.seed)
    for name in ("groups", "count"):
        if getattr(how, name):
            raise ConfigError(f"--{name} is for the built-in images; leave it out for {source}")
    return open_source(source, **{name: getattr(how, name) for name in READING})


def _composing(how: Prepare) -> dict[str, Any]:
    count = 50_000 if how.count is None else how.count
    return {"size": how.image_size, "count": count, "groups": how.groups}


def _online(source: str, out: str, how: Prepare) -> Any:
    """A folder that encodes while training."""
    options = {name: getattr(how, name) for name in READING}
    if source in BUILT_IN:
        options = _composing(how)
        options = options if how.groups else {k: v for k, v in options.items() if k != "groups"}
    same = ("vae", "encoders", "image_size", "crop", "flip", "seed", "class_token")
    options |= {name: getattr(how, name) for name in same}
    return on_the_fly.write(source, out, precision=how.precision or "bfloat16", **options)


def pick_device(name: str) -> str:
    """`auto` as the device there is. Raises ConfigError for one that cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try auto or cpu") from None
    return name
