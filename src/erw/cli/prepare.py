"""`erw prepare`: images in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erw.cli.sample import BUILT_IN, pick_device
from erw.cli.settings import Parser, add_settings, changed, settings
from erw.config import to_dict
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.data.sources import Source


READING = ("classes", "split", "subset", "columns")
"""Settings that say how images are found in IMAGES."""


@dataclass(frozen=True)
class Prepare:
    """How a cache is made.

    Attributes:
        vae: openmoji-f4c4, sd-vae-ft-ema, sdxl, sd3, flux, taesd, e2e-vavae, va-vae=FILE, a folder
            as diffusers saves it, NAME=FOLDER for local weights, or none (plain pixels).
        encoders: whose patch features are stored: NAME, NAME@SIDE, NAME=FOLDER for local weights,
            or a folder as transformers saves it; docs/data.md lists the names.
        image_size: side of the cropped square.
        count: how many of the built-in images to compose; folders are taken whole.
        groups: which classes of the built-in images, such as flags food-drink; empty: all 9.
        classes: labels from dataset.json or folders (auto), folders, the innermost folder, or none.
        split: which part of a data set of the hub, or of a folder in its layout, such as train.
        subset: which of its configurations, if it has several.
        columns: names of the image and the label column of tables, where they are unusual.
        crop: adm (centre, as ADM does), random, or resize.
        features: how features are stored; int8 has one scale per token.
        class_token: store the encoders' class tokens too, for REG and RCG.
        flip: store the mirrored image as a second variant.
        images: store the cropped images too, as a reference for evaluation.
        rows_per_shard: images per shard; what is lost at most if this is stopped.
        batch_size: images encoded at once.
        precision: bfloat16 encodes under autocast.
        seed: moves random crops, and the built-in images.
        workers: threads that decode and crop; none: one per core, 8 at most.
        device: where the encoders run; auto: a GPU if there is one.
        strict: stop at the first unreadable image instead of listing it in rejected.jsonl.
    """

    vae: str = "openmoji-f4c4"
    encoders: tuple[str, ...] = ("efficientnet-lite0",)
    image_size: int = 64
    count: int = 50_000
    groups: tuple[str, ...] = ()
    classes: Literal["auto", "folders", "leaf", "none"] = "auto"
    split: str | None = None
    subset: str | None = None
    columns: tuple[str, ...] = ()
    crop: Literal["adm", "random", "resize"] = "adm"
    features: Literal["float16", "bfloat16", "int8"] = "float16"
    class_token: bool = False
    flip: bool = False
    images: bool = False
    rows_per_shard: int = 1024
    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    strict: bool = False


def prepare(args: Sequence[str]) -> None:
    """Encode images into a cache; the same command resumes, and makes damaged shards again."""
    found = _read(args)
    if found.verify:
        from erw.data.prepare import verify

        cache = verify(found.out)
        print(f"{cache!r}: all {len(cache.manifest.shards)} shards are whole")
        return
    how = _settings(found)
    source = None
    if found.source is not None:
        source = _open(found.source, how, counted="count" in found)
    if found.add_encoder:
        print(_add(source, how, found))
        return
    assert source is not None
    if found.dry_run:
        from erw.data.prepare import estimate

        print(estimate(source, found.out, **_options(how, found)))
        return
    if found.online:
        print(repr(_online(found.source, found.out, how, precise="precision" in found)))
        return
    from erw.data.prepare import prepare as go

    print(go(source, found.out, **_options(how, found)))


def _options(how: Prepare, found: Any) -> dict[str, Any]:
    """Arguments of `erw.data.prepare.prepare`; the source has taken the other settings."""
    options = {k: v for k, v in to_dict(how).items() if k not in ("count", "groups", *READING)}
    options["features"] = getattr(found, "features", None)  # encoders of a cache may differ in it
    return options | {"device": pick_device(how.device)}


def _read(args: Sequence[str]) -> Any:
    """The options, with what is missing refused."""
    what = (
        "IMAGES: a folder, zip or tar, WebDataset shards, Parquet, Arrow or NumPy files, "
        "hf:OWNER/NAME, a data set of the Hugging Face hub, or "
        f"{BUILT_IN} or {BUILT_IN}-test, the built-in sets. Settings that are not given are those "
        "of the cache in DIR, if there is one."
    )
    parser = Parser("erw prepare", what, usage="IMAGES --out DIR [--SETTING VALUE ...]")
    parser.add_argument("source", metavar="IMAGES", nargs="?")
    parser.add_argument("--out", metavar="DIR", help="folder of the cache")
    parser.add_argument(
        "--add-encoder", nargs="+", default=[], metavar="NAME",
        help="add features to the cache in DIR, made of the same IMAGES (or of those it holds)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="count images and bytes only")
    parser.add_argument("--verify", action="store_true", help="recheck every hash of DIR only")
    parser.add_argument("--online", action="store_true", help="store nothing, encode in training")
    add_settings(parser, Prepare())
    found = parser.read(args)
    alone = found.verify or found.add_encoder
    if found.out is None or (found.source is None and not alone):
        parser.error("the following arguments are required: IMAGES, --out")
    return found


def _settings(found: Any) -> Prepare:
    """What was asked for, else what the cache has that is there, else the defaults."""
    from erw.data.prepare import read_spec

    base = Prepare()
    if spec := read_spec(Path(found.out).expanduser()):
        same = ("image_size", "crop", "flip", "images", "rows_per_shard", "precision", "seed")
        base = replace(
            base,
            vae=spec.vae.name,
            encoders=tuple(encoder.name for encoder in spec.encoders),
            **{name: getattr(spec, name) for name in same},
        )
        if spec.source.name == {BUILT_IN: "openmoji-train"}.get(found.source, found.source):
            base = replace(base, count=spec.source.count)
    return changed(base, found)


def _add(source: Source | None, how: Prepare, found: Any) -> Any:
    """Add the encoders named to a cache; what does not concern them may not be given."""
    from erw.data.prepare import add_encoders

    may = ("features", "class_token", "batch_size", "workers", "device", "count", "seed",
        "groups")  # fmt: skip
    given = [setting.name for setting in settings(Prepare()) if setting.name in found]
    given += [name for name in ("online", "dry_run") if getattr(found, name)]
    for name in given:
        if name not in (*may, *READING):
            name = name.replace("_", "-")
            raise ConfigError(f"--{name} does not go with --add-encoder: leave it out")
    return add_encoders(
        source, found.out, encoders=found.add_encoder,
        class_token=how.class_token, batch_size=how.batch_size, workers=how.workers,
        device=pick_device(how.device), features=getattr(found, "features", None),
    )  # fmt: skip


def _open(where: str, how: Prepare, *, counted: bool) -> Source:
    """The images named; the built-in ones are composed at the size asked for."""
    from erw.data.sources import open_source

    if where.startswith(BUILT_IN):
        return open_source(
            where, size=how.image_size, count=how.count, seed=how.seed, groups=how.groups
        )
    if how.groups:
        raise ConfigError(f"--groups chooses built-in images; {where} has classes of its own")
    if counted:
        raise ConfigError(f"--count composes built-in images; {where} is taken whole, leave it out")
    return open_source(where, **{name: getattr(how, name) for name in READING})


def _online(where: str, out: str, how: Prepare, *, precise: bool) -> Any:
    """A folder that encodes while training, in bfloat16 unless the precision was given."""
    from erw.data.on_the_fly import write

    if where in (BUILT_IN, f"{BUILT_IN}-test"):
        options: dict[str, Any] = {"size": how.image_size, "count": how.count}
        options |= {"groups": how.groups} if how.groups else {}
    else:
        options = {name: getattr(how, name) for name in READING}
    return write(
        where, out, vae=how.vae, encoders=how.encoders, image_size=how.image_size, crop=how.crop,
        flip=how.flip, precision=how.precision if precise else "bfloat16", seed=how.seed,
        class_token=how.class_token, **options,
    )  # fmt: skip
