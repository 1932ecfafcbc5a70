"""Images to a cache, once: decode, crop, encode, write; the same command resumes or verifies."""

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CacheError, ConfigError, DataError
from .cache import Cache
from .claims import Claims
from .manifest import (
    MANIFEST,
    REJECTED,
    REPORT,
    SETTINGS,
    Manifest,
    Record,
    join,
    record_path,
    rejected_lines,
    shard_path,
)
from .progress import Bar, summary
from .rows import Networks, Span, cropped, fill
from .settings import describe, differences, load_networks
from .shards import write_shard, write_text
from .sources import Source, open_source


@dataclass
class Job:
    """One process's share of the work: shards rank, rank + world, ..."""

    source: Source
    out: Path
    settings: dict[str, Any]
    networks: Networks
    batch_size: int
    workers: int
    strict: bool
    rank: int
    world: int
    finished: set[int] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Where shards and their records lie."""
        return self.out / "shards"

    def spans(self) -> list[Span]:
        """All shards of the cache, whichever rank makes them."""
        step, count = self.settings["rows_per_shard"], self.settings["source"]["count"]
        starts = range(0, count, step)
        return [Span(i, first, min(first + step, count)) for i, first in enumerate(starts)]

    def done(self, index: int) -> bool:
        """Whether a shard is there, whoever made it."""
        if index not in self.finished and Record.read(self.folder, index) is not None:
            self.finished.add(index)
        return index in self.finished


def prepare(
    source: Source | str | Path,
    out: str | Path,
    *,
    vae: Any,
    encoders: Sequence[Any] = (),
    image_size: int,
    batch_size: int = 64,
    crop: str = "adm",
    features: str = "float16",
    flip: bool = False,
    images: bool = False,
    rows_per_shard: int = 1024,
    precision: str = "float32",
    seed: int = 0,
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
        features: how features are stored: float16, bfloat16, or int8 or
            float8 (e4m3) with a scale per token.
        flip: store the mirrored image's moments and features as a second variant.
        images: store the cropped uint8 images too, as a reference for evaluation.
        rows_per_shard: source items per shard; one shard is held in memory.
        precision: "float32", or "bfloat16" to encode under autocast.
        workers: threads that decode and crop; by default one per core, at most 8.
        strict: stop at the first bad image instead of listing it in rejected.jsonl.
        repair: make damaged shards again instead of naming them.
        rank, world: this process and how many there are; from RANK and WORLD_SIZE by default.
        patience: seconds without a new shard after which other processes are taken for dead.
        progress: show a bar, and the report at the end.

    Raises `CacheError` if `out` was made with other settings, is damaged, or the disk is full;
    `ConfigError` for impossible settings; `DataError` and `FileNotFoundError` as `open_source`.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world}: expected 0 to {world - 1}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected at least 1")
    source, out = open_source(source), Path(out).expanduser()
    networks = load_networks(vae, encoders, features=features, precision=precision, device=device)
    settings = describe(
        source, networks, image_size=image_size, crop=crop, rows_per_shard=rows_per_shard,
        seed=seed, flip=flip, images=images,
    )  # fmt: skip
    workers = workers or min(8, os.cpu_count() or 1)
    job = Job(source, out, settings, networks, batch_size, workers, strict, rank, world)
    _begin(job)
    if (out / MANIFEST).exists() and not _damaged(job, repair=repair):
        return Cache.open(out)
    began = time.monotonic()
    mine = sum(span.stop - span.first for span in job.spans()[rank::world])
    with Bar(f"prepare {source.name}", total=mine, shown=progress) as bar:
        _work(job, bar, patience=patience)
    cache = Cache.open(out)
    if rank == 0:
        report = summary(cache, seconds=time.monotonic() - began, encoded=bar.encoded)
        write_text(out / REPORT, json.dumps(report, indent=1) + "\n")
        bar.say(report, out / REJECTED)
    return cache


def _begin(job: Job) -> None:
    """Note the settings in a new folder, or compare them with those it was begun with."""
    path = job.out / SETTINGS
    if not path.exists():
        if job.out.is_dir() and any(_foreign(item) for item in job.out.iterdir()):
            raise CacheError(f"{job.out} is no cache and not empty: choose another folder")
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(job.settings, indent=1, sort_keys=True) + "\n")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CacheError(f"{path} is damaged ({error}): remove {job.out}, prepare again") from error
    if changed := differences(found, job.settings):
        raise CacheError(
            f"{job.out} was begun with other settings: {', '.join(changed)}; choose another folder "
            "or remove it"
        )
    job.settings = found  # FLOPs may be counted otherwise by another torch: keep the first


def _foreign(item: Path) -> bool:
    """Something that no process beginning this cache just now would have put there."""
    if item.name == "shards" and item.is_dir():
        return any(not inner.name.startswith(".") for inner in item.iterdir())
    return not item.name.startswith(".")


def verify(out: str | Path) -> Cache:
    """Rehash every shard of a finished cache and open it.

    Raises `CacheError` that names the damaged shards, or says that the cache is unfinished.
    """
    out = Path(out).expanduser()
    if bad := Cache(out, Manifest.read(out)).verify():
        raise _named(out, bad)
    return Cache.open(out)


def _named(out: Path, bad: list[str]) -> CacheError:
    named = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
    return CacheError(f"{out}: damaged shards {named}: make them again with --repair")


def _damaged(job: Job, *, repair: bool) -> bool:
    """Rehash a finished cache; with `repair`, clear what is damaged so that it is made again."""
    bad = Cache(job.out, Manifest.read(job.out)).verify()
    if bad and not repair:
        raise _named(job.out, bad)
    for name in bad:
        record_path(job.folder, int(name.split(".")[0])).unlink(missing_ok=True)
    if bad:
        (job.out / MANIFEST).unlink(missing_ok=True)
    return bool(bad)


def _work(job: Job, bar: Bar, *, patience: float) -> None:
    """Make this rank's shards, wait for everyone's, join them."""
    spans = job.spans()
    for span in spans[job.rank :: job.world]:
        if job.done(span.shard):
            bar.skip(span.stop - span.first)
    last, missing = time.monotonic(), len(spans)
    with Claims(job.folder) as claims:
        while True:
            _make(job, bar, claims)
            left = [span.shard for span in spans if not job.done(span.shard)]
            if not left and job.rank == 0:
                _join(job)
            if not left and (job.out / MANIFEST).exists():
                return
            if len(left) < missing:
                last, missing = time.monotonic(), len(left)
            if time.monotonic() - last > patience:
                raise CacheError(
                    f"{job.out}: shards {left[:8]} of other processes did not come within "
                    f"{patience:.0f} s: start those ranks again, or run this on one"
                )
            bar.waiting(len(left))
            time.sleep(0.1)


def _make(job: Job, bar: Bar, claims: Claims) -> None:
    """Write every shard of this rank that is missing and that no other process is writing."""
    settings = job.settings

    def free() -> Iterator[Span]:
        for span in job.spans()[job.rank :: job.world]:
            if not job.done(span.shard) and claims.take(span.shard):
                if job.done(span.shard):
                    claims.drop(span.shard)
                else:
                    yield span

    ahead = cropped(
        job.source, free(), size=settings["image_size"], kind=settings["crop"],
        seed=settings["seed"], workers=job.workers,
    )  # fmt: skip
    for span, items in ahead:
        filling = fill(
            job.source, span, items, networks=job.networks, batch_size=job.batch_size,
            options=settings, strict=job.strict, advance=bar.advance,
        )  # fmt: skip
        try:
            columns = filling.columns()
            path = shard_path(job.folder, span.shard)
            files = (write_shard(path, columns),) if columns else ()
            filling.record(files).write(job.folder)
        except OSError as error:
            raise _full(job, error) from error
        claims.drop(span.shard)


def _full(job: Job, error: OSError) -> Exception:
    """The error to raise for a failed write: a clear one if the disk is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    whole = [span for span in job.spans() if job.done(span.shard)]
    return CacheError(
        f"no space left for {job.out}: {len(whole)} of {len(job.spans())} shards are whole and "
        "kept; free some space and run the same command again"
    )


def _join(job: Job) -> None:
    """Write rejected.jsonl and the manifest from the records of all shards."""
    found = [Record.read(job.folder, span.shard) for span in job.spans()]
    records = [record for record in found if record is not None]
    assert len(records) == len(found), "joined before all shards were there"
    try:
        write_text(job.out / REJECTED, rejected_lines(records))
        if not any(record.shard.rows for record in records):
            _, path, reason = records[0].rejected[0]
            raise DataError(
                f"none of the {len(job.source)} images of {job.source.name} can be used: "
                f"{path}: {reason}; all reasons are in {job.out / REJECTED}"
            )
        join(job.settings, job.source.class_names, records).write(job.out)
    except OSError as error:
        raise _full(job, error) from error
