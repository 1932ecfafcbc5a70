"""Images to a cache, once: decode, crop, encode, write; the same command resumes or verifies."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erw.data import growth
from erw.data.begin import begin, part_of, write_settings
from erw.data.cache import Cache
from erw.data.claims import settling
from erw.data.job import Job, work
from erw.data.manifest import MANIFEST, REJECTED, REPORT, Manifest
from erw.data.progress import Bar, summary
from erw.data.repair import damaged, named
from erw.data.settings import begun, describe, describe_encoders, identity, load_networks
from erw.data.sources import Source, open_source, overview
from erw.errors import CacheError, ConfigError, DataError
from erw.io import write_text


def prepare(
    source: Source | str | Path,
    out: str | Path,
    *,
    vae: Any,
    encoders: Sequence[Any] = (),
    image_size: int,
    batch_size: int = 64,
    crop: str = "adm",
    features: str | None = None,
    pca: int | None = None,
    class_token: bool = False,
    flip: bool = False,
    images: bool = False,
    rows_per_shard: int = 1024,
    precision: str = "float32",
    seed: int = 0,
    append: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    strict: bool = False,
    repair: bool = False,
    rank: int | None = None,
    world: int | None = None,
    patience: float = 3600.0,
    progress: bool = True,
) -> Cache:
    """Encode a source into a cache folder and open it.

    Running it again goes on with the shards that are missing; if none is, every hash is checked.
    Under torchrun each rank makes its own shards and rank 0 joins them, to the same bytes as one.

    Args:
        source: see `open_source`.
        out: the cache's folder, new or begun with the same settings.
        vae, encoders: objects, or names for `load_vae` and `load_encoder`.
        image_size: side of the cropped square, a multiple of the VAE's factor.
        batch_size: images encoded at once; batches never cross shards.
        crop: one of `CROPS`. `seed` moves only random crops.
        features: how features are stored: float16, bfloat16, or int8 or float8 (e4m3) with a
            scale per token. None: as the cache has them, or float16.
        pca: store this many principal components of each token (see `pca`). None: as the cache.
        class_token: store the class token of every encoder that has one too, in float16.
        flip: store the mirrored image's moments and features as a second variant.
        images: store the cropped uint8 images too, as a reference for evaluation.
        rows_per_shard: source items per shard; one shard is held in memory.
        precision: "float32", or "bfloat16" to encode under autocast.
        append: add the source to the finished cache in `out`, in shards of its own. Classes are
            matched by name, new ones come after those that are there.
        workers: threads that decode and crop; by default one per core, at most 8.
        strict: stop at the first bad image instead of listing it in rejected.jsonl.
        repair: make damaged shards again instead of naming them.
        rank, world: this process and how many there are; from RANK and WORLD_SIZE by default.
        patience: seconds without a new shard after which other processes are taken for dead.
        progress: show a bar, and the report at the end.

    Raises `CacheError` if `out` was made with other settings, is damaged, or the disk is full;
    `ConfigError` for impossible settings; `DataError` and `FileNotFoundError` as `open_source`.
    """
    rank, world = _place(rank, world)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected at least 1")
    source, out = open_source(source), _local(out)
    found = begun(out)
    networks = load_networks(vae, encoders, precision=precision, device=device)
    wanted = describe(
        source, networks, image_size=image_size, crop=crop, rows_per_shard=rows_per_shard,
        features=features, pca=pca, class_token=class_token, like=found, seed=seed, flip=flip,
        images=images,
    )  # fmt: skip
    settings = begin(out, wanted, source, append=append)
    part, number = part_of(settings, source, wanted["source"])
    workers = workers or min(8, os.cpu_count() or 1)
    job = Job(out, settings, part, number, networks, batch_size, workers, strict, rank, world)
    return _go(job, repair=repair, patience=patience, progress=progress)


def prepare_builtin(
    out: str | Path,
    *,
    image_size: int = 64,
    count: int = 50_000,
    class_token: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> Cache:
    """The cache of the quickstart recipes: `erw prepare openmoji --out OUT --image-size 64`.

    Composed OpenMoji glyphs, latents of `openmoji-f4c4`, features of `efficientnet-lite0`; nothing
    is downloaded. Running it again resumes, or verifies.
    """
    return prepare(
        open_source("openmoji", size=image_size, count=count),
        out,
        vae="openmoji-f4c4",
        encoders=("efficientnet-lite0",),
        image_size=image_size,
        class_token=class_token,
        device=device,
        progress=progress,
    )


def add_encoders(
    source: Source | str | Path | None,
    out: str | Path,
    *,
    encoders: Sequence[Any],
    features: str | None = None,
    pca: int | None = None,
    class_token: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
    workers: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    patience: float = 3600.0,
    progress: bool = True,
) -> Cache:
    """Add features of more encoders to a finished cache, beside what it holds, and open it.

    Nothing that is there is read anew or written again. Running it again goes on, or verifies.

    Args:
        source: the images again: each of the cache's sources in turn, if it has several. Rows are
            matched by the number of their image, once the source's fingerprint is that of the
            cache. None: the images that the rows hold, of a cache made with `images`.
        out, encoders, features, pca, class_token, batch_size, device, workers: as for `prepare`;
            the rest is as the cache has it. Equal batches give features that are equal to the bit.
        rank, world, patience, progress: as for `prepare`.

    Raises `CacheError` if the images are others, have changed, or the cache is not finished.
    """
    rank, world = _place(rank, world)
    out = _local(out)
    found = begun(out)
    if found is None:
        raise CacheError(f"no cache at {out}: make one with erw prepare IMAGES --out {out}")
    networks = load_networks(None, encoders, precision=found["precision"], device=device)
    told = describe_encoders(
        networks, image_size=found["image_size"], features=features, pca=pca,
        class_token=class_token, like=found,
    )  # fmt: skip
    names = ", ".join(entry["name"] for entry in growth.sources(found))
    if source is None and not found["images"]:
        raise CacheError(f"{out} holds no images: give those that it was made of ({names}) again")
    part: growth.Part | growth.Stored
    number: int | None = None
    opened = None if source is None else open_source(source)
    with settling(out):
        found = begun(out) or found  # another rank may have noted it just now
        settings = growth.add(out, found, told)
        if opened is None:
            part = growth.Stored(out)
        else:
            part, number = part_of(settings, opened, identity(opened))
        if settings != found:
            write_settings(out, settings)
    workers = workers or min(8, os.cpu_count() or 1)
    job = Job(out, settings, part, number, networks, batch_size, workers, False, rank, world)
    return _go(job, repair=False, patience=patience, progress=progress)


def verify(out: str | Path) -> Cache:
    """Rehash every shard of a finished cache and open it.

    Raises `CacheError` that names the damaged shards, or says that the cache is unfinished.
    """
    if "://" in str(out) or (Path(out).expanduser() / "online.json").is_file():
        cache = Cache.open(out)
    else:  # what is cut short or missing is named with the rest, not refused at once
        out = Path(out).expanduser()
        cache = Cache(out, Manifest.read(out))
    if bad := cache.verify():
        raise named(cache.where, bad)
    return Cache.open(out)


def abandon(out: str | Path) -> Cache:
    """Forget images or encoders that were being added to a cache and not finished; open the rest.

    Raises `CacheError` if there is nothing to forget, or another process is still at it.
    """
    out = _local(out)
    found = begun(out)
    if found is None or Manifest.read(out).settings == found:
        raise CacheError(f"nothing is being added to {out}: there is nothing to abandon")
    with settling(out):
        write_settings(out, growth.abandon(out, found))
    return Cache.open(out)


def _go(job: Job, *, repair: bool, patience: float, progress: bool) -> Cache:
    """Verify what is finished, or make what is missing and report on it."""
    if job.joined() and not damaged(job, repair=repair):
        cache = Cache.open(job.out)
        if job.strict and cache.manifest.rejected:
            raise DataError(
                f"{job.out} was made without {cache.manifest.rejected} images that cannot be read, "
                f"listed in {job.out / REJECTED}: mend them and make another, or leave out --strict"
            )
        return cache
    began = time.monotonic()
    mine = sum(span.stop - span.first for span in job.own()[job.rank :: job.world])
    before = Manifest.read(job.out).class_names if (job.out / MANIFEST).exists() else None
    with Bar(f"prepare {job.source.name}", total=mine, shown=progress) as bar:
        for line in overview(job.source):
            bar.note(line)
        if before is not None and (new := job.source.class_names[len(before) :]):
            bar.note(f"classes that the cache did not have: {', '.join(new)}")
        others = work(job, bar, patience=patience)
    if others:
        told = growth.sources(job.settings)
        names = ", ".join(told[number]["name"] for number in sorted({s.source for s in others}))
        bar.note(f"{len(others)} parts are still to be made of {names}: run this with them too")
        return Cache.open(job.out)
    cache = Cache.open(job.out)
    if job.rank == 0:
        report = summary(cache, seconds=time.monotonic() - began, encoded=bar.encoded)
        write_text(job.out / REPORT, json.dumps(report, indent=1) + "\n")
        bar.say(report, job.out / REJECTED)
    return cache


def _place(rank: int | None, world: int | None) -> tuple[int, int]:
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world}: expected 0 to {world - 1}")
    return rank, world


def _local(out: str | Path) -> Path:
    if "://" in str(out):
        raise CacheError(
            f"a cache is made in a local folder, not at {out}: copy it there when done"
        )
    return Path(out).expanduser()
