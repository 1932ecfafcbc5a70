"""`erw prepare` and `erw sample`: images in, and images out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from erw.cli.settings import Parser, add_settings, changed
from erw.config import Sample, nearest, to_dict
from erw.errors import ConfigError

if TYPE_CHECKING:
    from erw.data.sources import Source
    from erw.sample import Generation
    from erw.train import Trained

BUILT_IN = "openmoji"


@dataclass(frozen=True)
class Prepare:
    """How a cache is made.

    Attributes:
        vae: openmoji-f4c4, sd-vae-ft-ema, sdxl, sd3, flux, taesd, va-vae=FILE, a folder as
            diffusers saves it, NAME=FOLDER for local weights, or none (plain pixels).
        encoders: whose patch features are stored: NAME, NAME@SIDE, NAME=FOLDER for local weights,
            or a folder as transformers saves it; docs/data.md lists the names.
        image_size: side of the cropped square.
        count: how many of the built-in images to compose; folders are taken whole.
        classes: labels from dataset.json or folders (auto), folders, the innermost folder, or none.
        crop: adm (centre, as ADM does), random, or resize.
        features: how features are stored; int8 and float8 have one scale per token.
        flip: store the mirrored image as a second variant.
        images: store the cropped images too, as a reference for evaluation.
        rows_per_shard: images per shard; what is lost at most if this is stopped.
        batch_size: images encoded at once.
        precision: bfloat16 encodes under autocast.
        seed: moves random crops, and the built-in images.
        workers: threads that decode and crop; none: one per core, 8 at most.
        device: where the encoders run; auto: a GPU if there is one.
        strict: stop at the first unreadable image instead of listing it in rejected.jsonl.
        repair: make damaged shards again.
    """

    vae: str = "openmoji-f4c4"
    encoders: tuple[str, ...] = ("efficientnet-lite0",)
    image_size: int = 64
    count: int = 50_000
    classes: Literal["auto", "folders", "leaf", "none"] = "auto"
    crop: Literal["adm", "random", "resize"] = "adm"
    features: Literal["float16", "bfloat16", "int8", "float8"] = "float16"
    flip: bool = False
    images: bool = False
    rows_per_shard: int = 1024
    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    strict: bool = False
    repair: bool = False


@dataclass(frozen=True)
class Draw:
    """What to draw, besides the sampler's settings.

    Attributes:
        seeds: one image each, such as 0:16 or 3,5,8:10.
        labels: a class or one per seed, by number or name; none: the classes in turn.
        batch_size: images at once; does not change them.
        precision: bf16 runs the network under autocast.
        vae: decoder of the latents; none: the one that the run was trained with.
    """

    seeds: str = "0:16"
    labels: str | None = None
    batch_size: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    vae: str | None = None


def prepare(args: Sequence[str]) -> None:
    """Encode images into a cache; the same command goes on, or verifies what is there."""
    what = (
        "IMAGES: a folder, zip or tar, WebDataset shards, Parquet, Arrow or NumPy files, or "
        f"{BUILT_IN} or {BUILT_IN}-test, the built-in sets."
    )
    parser = Parser("erw prepare", what, usage="IMAGES --out DIR [--SETTING VALUE ...]")
    parser.add_argument("source", metavar="IMAGES")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument("--dry-run", action="store_true", help="count images and bytes only")
    parser.add_argument("--verify", action="store_true", help="recheck every hash of DIR only")
    parser.add_argument("--online", action="store_true", help="store nothing, encode in training")
    add_settings(parser, Prepare())
    found = parser.read(args)
    how = changed(Prepare(), found)
    if found.verify:
        from erw.data.prepare import verify

        cache = verify(found.out)
        print(f"{cache!r}: all {len(cache.manifest.shards)} shards are whole")
        return
    source = _open(found.source, how, counted="count" in found)
    if found.dry_run:
        print(_forecast(source, how))
        return
    if found.online:
        print(repr(_online(found.source, found.out, how, precise="precision" in found)))
        return
    from erw.data.prepare import prepare as go

    options = to_dict(how)
    for name in ("count", "classes"):  # the source has taken them
        del options[name]
    print(go(source, found.out, **{**options, "device": pick_device(how.device)}))


def sample(args: Sequence[str]) -> None:
    """Draw images from a run's EMA weights; the same command makes what is missing."""
    model, found = trained("sample", args, out="a folder of PNGs, or a file ending in .npz")
    from erw.runtime.dist import world
    from erw.runtime.log import Console
    from erw.sample import write

    drawing = generation(model, found)
    if found.dry_run:
        print("\n".join(f"{name:<14}{value}" for name, value in drawing.settings.items()))
        print(f"{'images':<14}{len(drawing)}")
        return
    console, done = Console(f"sample {model.run.name}"), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        console.step(done, len(drawing))

    with world():
        print(write(drawing, found.out, progress=progress))


def trained(verb: str, args: Sequence[str], *, out: str) -> tuple[Trained, Any]:
    """The run named first in `args`, loaded, and the options after it; defaults are its own."""
    usage, what = "RUN --out PATH [--SETTING VALUE ...]", "RUN: the folder that `erw train` wrote."
    own = Sample()
    model = None
    if args and not args[0].startswith("-"):
        from erw.train import load

        model = load(args[0], device=pick_device("auto"))
        own = model.run.sample
    parser = Parser(f"erw {verb}", what, usage=usage)
    parser.add_argument("--out", required=True, metavar="PATH", help=out)
    parser.add_argument("--dry-run", action="store_true", help="print all settings, draw nothing")
    add_settings(parser, own)
    add_settings(parser, Draw())
    if model is None:
        if set(args) & {"-h", "--help"}:
            parser.parse_args(["--help"])
        raise ConfigError(f"erw {verb} needs a run first: the folder that `erw train` wrote")
    return model, parser.read(args[1:])


def generation(model: Trained, found: Any, draw: Draw = Draw()) -> Generation:
    """What the options ask `erw.generate` for; `draw` has the values of those not given."""
    from erw.sample import generate

    how, what = changed(model.run.sample, found), changed(draw, found)
    seeds = numbers(what.seeds, name="--seeds")
    labels = None
    if what.labels is not None:
        given = [_label(text, model.class_names) for text in what.labels.split(",")]
        labels = given[0] if len(given) == 1 else given
    return generate(
        model,
        seeds,
        labels,
        **to_dict(how),
        batch_size=what.batch_size,
        precision=what.precision,
        vae=what.vae,
    )


def numbers(text: str, *, name: str) -> list[int]:
    """3,5,8:10 -> [3, 5, 8, 9]. Raises ConfigError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?::(\d+))?", part.strip())):
            raise ConfigError(f"{name}: expected numbers and ranges such as 3,5,8:10, got {text!r}")
        first = int(match[1])
        found += range(first, int(match[2])) if match[2] else [first]
    return found


def pick_device(name: str) -> str:
    """`auto` as the device there is. Raises ConfigError for one that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try auto or cpu") from None
    return name


def _open(where: str, how: Prepare, *, counted: bool) -> Source:
    """The images named; the built-in ones are composed at the size asked for."""
    from erw.data.sources import open_source

    if where.startswith(BUILT_IN):
        return open_source(where, size=how.image_size, count=how.count, seed=how.seed)
    if counted:
        raise ConfigError(f"--count composes built-in images; {where} is taken whole, leave it out")
    return open_source(where, classes=how.classes)


def _online(where: str, out: str, how: Prepare, *, precise: bool) -> Any:
    """A folder that encodes while training, in bfloat16 unless the precision was given."""
    from erw.data.online import write

    if where in (BUILT_IN, f"{BUILT_IN}-test"):
        options: dict[str, Any] = {"size": how.image_size, "count": how.count}
    else:
        options = {"classes": how.classes}
    return write(
        where, out, vae=how.vae, encoders=how.encoders, image_size=how.image_size, crop=how.crop,
        flip=how.flip, precision=how.precision if precise else "bfloat16", seed=how.seed,
        **options,
    )  # fmt: skip


def _label(text: str, names: Sequence[str]) -> int:
    text = text.strip()
    if text.isdecimal():
        return int(text)
    if text not in names:
        raise ConfigError(f"--labels: no class {text!r}{nearest(text, names)}")
    return names.index(text)


def _forecast(source: Source, how: Prepare) -> str:
    """Images, classes and bytes that a cache will take."""
    from erw.data.forecast import table
    from erw.data.rows import Networks
    from erw.data.settings import describe, load_networks

    networks: Networks = load_networks(
        how.vae, how.encoders, features=how.features, precision=how.precision, device="cpu"
    )
    settings = describe(
        source, networks, image_size=how.image_size, crop=how.crop,
        rows_per_shard=how.rows_per_shard, seed=how.seed, flip=how.flip, images=how.images,
    )  # fmt: skip
    flops = settings["vae"]["flops"] + sum(part["flops"] for part in settings["encoders"])
    flops *= 2 if how.flip else 1
    lines = [f"images      {len(source):,} of {source.name}"]
    lines += [f"classes     {len(source.class_names)} ({', '.join(source.class_names[:12])})"]
    lines += [f"shards      {math.ceil(len(source) / how.rows_per_shard)}"]
    lines += [f"encoding    {flops / 1e9:.3f} GFLOP an image", ""]
    lines += [table(settings, images=len(source))]
    return "\n".join(lines)
