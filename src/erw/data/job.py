"""One process's share of making a cache: which spans are missing, make them, join them."""

import errno
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from erw.data import pca
from erw.data.claims import Claims
from erw.data.encoding import Networks, one_thread_each
from erw.data.growth import Part, Stored, held, sources, spans
from erw.data.manifest import (
    MANIFEST,
    REJECTED,
    SETTINGS,
    Manifest,
    Record,
    join,
    record_file,
    rejected_lines,
)
from erw.data.progress import Bar
from erw.data.rows import Filling, Span, cropped, fill, stacked
from erw.data.shards import write_shard
from erw.errors import CacheError, DataError
from erw.io import remove_partial, write_text

FITTING = 1 << 16
"""Stands for the fit of an encoder's components among the claims on files that encoders add."""


@dataclass
class Job:
    """Spans rank, rank + world, ... of those that the images at hand go into.

    `number`: which of the cache's sources `source` is; None: the images that its rows hold, which
    can only give features that were added.
    """

    out: Path
    settings: dict[str, Any]
    source: Part | Stored
    number: int | None
    networks: Networks
    batch_size: int
    workers: int
    strict: bool
    rank: int
    world: int
    finished: set[Span] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Where shards and their records lie."""
        return self.out / "shards"

    def all(self) -> list[Span]:
        """All spans of the cache, whatever they are made of."""
        return spans(self.settings)

    def own(self) -> list[Span]:
        """Those that the images at hand go into, whichever rank makes them."""
        if self.number is None:
            return [span for span in self.all() if span.added is not None]
        mine = [span for span in self.all() if span.source == self.number]
        return sorted(mine, key=lambda span: span.added is not None)

    def done(self, span: Span) -> bool:
        """Whether a span's files are there, whoever made them."""
        if span not in self.finished and Record.read(self.folder, span.shard, span.added):
            self.finished.add(span)
        return span in self.finished

    def joined(self) -> bool:
        """Whether the manifest tells all that the cache is to hold."""
        path = self.out / MANIFEST
        return path.exists() and Manifest.read(self.out).settings == self.settings


def work(job: Job, bar: Bar, *, patience: float) -> list[Span]:
    """Make this rank's spans, wait for the other ranks' and join all.

    Gives back the spans that other images are needed for; nothing is joined while there are any.
    """
    own = job.own()
    for span in own[job.rank :: job.world]:
        if job.done(span):
            bar.skip(span.stop - span.first)
    last, missing = time.monotonic(), len(own)
    with one_thread_each() as pool, Claims(job.folder) as claims:
        job.networks = job.networks._replace(pool=pool)
        _reduce(job, claims, patience=patience)
        while True:
            _make(job, bar, claims)
            left = [span.shard for span in own if not job.done(span)]
            if not left:
                if others := [span for span in job.all() if not job.done(span)]:
                    return others
                if job.rank == 0:
                    _join(job)
                if job.joined():
                    return []
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
    """Write every span of this rank that is missing and that no other process is writing."""
    settings = job.settings

    def free() -> Iterator[Span]:
        for span in job.own()[job.rank :: job.world]:
            first = span._replace(added=None)
            if job.done(span) or (span != first and not job.done(first)):
                continue
            if not claims.take(span.shard, span.added):
                continue
            names = [record_file(span.shard, span.added), *span.files(settings)]
            remove_partial(job.folder, names)
            if job.done(span):
                claims.drop(span.shard, span.added)
            elif span.added is None and job.networks.vae is None:
                raise CacheError(f"{job.out}: shard {span.shard} is damaged: erw prepare --repair")
            elif span == first:
                yield span
            elif (grown := held(job.folder, span)).held:
                yield grown
            else:  # all its images were rejected: there is nothing to read
                Filling(grown).record(()).write(job.folder, span.added)
                claims.drop(span.shard, span.added)

    # Images that rows hold are cropped already; "adm" leaves those of the right size as they are.
    crop = settings["crop"] if job.number is not None else "adm"
    ahead = cropped(
        job.source, free(), size=settings["image_size"], kind=crop, seed=settings["seed"],
        workers=job.workers,
    )  # fmt: skip
    for span, items in ahead:
        filling = fill(
            job.source, span, items, networks=job.networks, batch_size=job.batch_size,
            options=settings, strict=job.strict, advance=bar.advance,
        )  # fmt: skip
        try:
            found = filling.files([told["name"] for told in settings["encoders"]])
            files = tuple(write_shard(job.folder / name, found[name]) for name in found)
            filling.record(files).write(job.folder, span.added)
        except OSError as error:
            raise _full(job, error) from error
        claims.drop(span.shard, span.added)


def _reduce(job: Job, claims: Claims, *, patience: float) -> None:
    """Read what reduces the features of each encoder; the first process to come fits it."""
    asked = enumerate(job.settings["encoders"])
    wanted = {i: told for i, told in asked if "pca" in told}
    before = Manifest.read(job.out).pca if (job.out / MANIFEST).exists() else {}
    for i, told in wanted.items():
        if told["name"] in before and pca.read_record(job.folder, i) is None:
            pca.write_record(job.folder, i, before[told["name"]])  # the record alone was lost
    began = time.monotonic()
    while wanted:
        for i, told in list(wanted.items()):
            if found := pca.read(job.folder, i):
                reductions = {**job.networks.pca, told["name"]: found}
                job.networks = job.networks._replace(pca=reductions)
                del wanted[i]
            elif claims.take(i, FITTING):
                if pca.read(job.folder, i) is None:
                    _fit(job, i, told)
                claims.drop(i, FITTING)
        if wanted and time.monotonic() - began > patience:
            raise CacheError(f"{job.out}: another process did not fit the components in time")
        time.sleep(0.1 * bool(wanted))


def _fit(job: Job, number: int, told: dict[str, Any]) -> None:
    """Fit the components of one encoder on images of the first source (see `pca`)."""
    if job.number:
        first = sources(job.settings)[0]["name"]
        raise CacheError(
            f"{job.out}: the components of {told['name']} are fitted on the images that the cache "
            f"began with: run this with {first} first"
        )
    settings, network = job.settings, job.networks.encoder(told["name"])
    images = pca.numbers(settings["source"]["count"])
    span = Span(0, 0, len(images), held=tuple((image, 0) for image in images))
    crop = settings["crop"] if job.number is not None else "adm"

    def batches() -> Iterator[torch.Tensor]:
        ahead = cropped(
            job.source, [span], size=settings["image_size"], kind=crop, seed=settings["seed"],
            workers=job.workers,
        )  # fmt: skip
        good = (item for _, items in ahead for item in items if item.pixels is not None)
        batch = []
        for item in good:
            batch.append(item)
            if len(batch) == job.batch_size:
                yield job.networks.run(network, stacked(batch).to(job.networks.device))
                batch = []
        if batch:
            yield job.networks.run(network, stacked(batch).to(job.networks.device))

    with torch.inference_mode():
        found, used = pca.fit(batches(), told["dim"], name=told["name"])
    try:
        pca.write(job.folder, number, found, images=used)
    except OSError as error:
        raise _full(job, error) from error


def _full(job: Job, error: OSError) -> Exception:
    """The error to raise for a failed write: a clear one if the disk is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    whole = [span for span in job.all() if job.done(span)]
    return CacheError(
        f"no space left for {job.out}: {len(whole)} of {len(job.all())} shards are whole and "
        "kept; free some space and run the same command again"
    )


def _join(job: Job) -> None:
    """Write rejected.jsonl and the manifest from the records of all spans."""
    found = [Record.read(job.folder, span.shard, span.added) for span in job.all()]
    records = [record for record in found if record is not None]
    assert len(records) == len(found), "joined before all shards were there"
    reductions = {
        told["name"]: pca.read_record(job.folder, i) or {}
        for i, told in enumerate(job.settings["encoders"])
        if "pca" in told
    }
    try:
        write_text(job.out / REJECTED, rejected_lines(records))
        if not any(record.shard.rows for record in records):
            _, path, reason = records[0].rejected[0]
            shutil.rmtree(job.folder)  # nothing is begun: other images may come here
            (job.out / SETTINGS).unlink()
            raise DataError(
                f"none of the {len(job.source)} images of {job.source.name} can be used: "
                f"{path}: {reason}; all reasons are in {job.out / REJECTED}"
            )
        manifest = join(job.settings, job.source.class_names, records, pca=reductions)
        manifest.write(job.out)
    except OSError as error:
        raise _full(job, error) from error
