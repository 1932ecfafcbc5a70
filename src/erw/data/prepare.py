"""Images to a cache, once: decode, crop, encode, write. The same command resumes and mends."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from erw.data.cache import Cache, open_part
from erw.data.manifest import (
    MANIFEST,
    REJECTED,
    SETTINGS,
    CacheSpec,
    Manifest,
    Record,
    readable,
    size_table,
)
from erw.data.networks import Networks, cache_spec, encoder_specs
from erw.data.sources import Source, open_source, overview
from erw.data.writer import Writer
from erw.dist import World, world
from erw.errors import CacheError, ConfigError, DataError
from erw.io import lock, write_json, write_text
from erw.log import Progress, say


def prepare(
    source: Source | str | Path,
    out: str | Path,
    *,
    vae: Any,
    encoders: Sequence[Any] = (),
    image_size: int,
    batch_size: int = 64,
    features: str | None = None,
    class_token: bool = False,
    flip: bool = False,
    images: bool = False,
    rows_per_shard: int = 1024,
    precision: str = "float32",
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Cache:
    """Encode a source (see `open_source`) into a cache folder and open it.

    Running it again makes what is missing or damaged. Under torchrun each rank makes its share of
    the shards, to the same bytes as one process. VAE and encoders are objects or names;
    `erw.cli.prepare.Prepare` explains the settings.

    Raises CacheError where `out` has other settings or is in use, ConfigError for a setting that
    is impossible, DataError and FileNotFoundError as `open_source`.
    """
    source, out = open_source(source), _local(out)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected at least 1")
    with world() as here:
        networks = Networks(vae, encoders, precision=precision, device=device)
        spec = cache_spec(
            source, networks, image_size=image_size, rows_per_shard=rows_per_shard,
            features=features, class_token=class_token, like=read_spec(out), seed=seed, flip=flip,
            images=images,
        )  # fmt: skip
        with _locked(out, here, spec) as spec:
            writer = Writer(out, spec, source, networks, batch_size)
            return _make(writer, here, progress=progress)


def prepare_builtin(
    out: str | Path, *, image_size: int = 64, count: int = 50_000, **options: Any
) -> Cache:
    """The cache of the quickstart recipes: `erw prepare openmoji --out OUT --image-size 64`.

    Composed OpenMoji glyphs, latents of `openmoji-f4c4`, features of `efficientnet-lite0`; nothing
    is downloaded. `options`: of `prepare`.
    """
    options = {"vae": "openmoji-f4c4", "encoders": ("efficientnet-lite0",)} | options
    source = open_source("openmoji", size=image_size, count=count)
    return prepare(source, out, image_size=image_size, **options)


def add_encoders(
    source: Source | str | Path,
    out: str | Path,
    *,
    encoders: Sequence[Any],
    features: str | None = None,
    class_token: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
    progress: bool = True,
) -> Cache:
    """Add features of more encoders to a finished cache and open it.

    The cache stays readable meanwhile, and then is as if it had always had them. Running it again
    resumes. `source` is what the cache was made of: other images raise CacheError. The rest is as
    for `prepare`.
    """
    out = _local(out)
    before = Manifest.read(out).spec
    given = open_source(source)
    if given.fingerprint() != before.source.fingerprint:
        raise CacheError(
            f"{given.name} ({len(given)} images) is not what {out} was made of, or has changed "
            f"since: expected {before.source.name} ({before.source.count} images)"
        )
    with world() as here:
        networks = Networks(None, encoders, precision=before.precision, device=device)
        new = encoder_specs(networks, before.image_size, features, class_token, like=before)
        with _locked(out, here, replace(before, encoders=new), adding=True) as spec:
            writer = Writer(out, spec, given, networks, batch_size)
            return _make(writer, here, progress=progress)


def verify(out: str | Path) -> Cache:
    """Rehash every file of a finished cache and open it. Raises CacheError for damaged ones."""
    if not (Path(out).expanduser() / "online.json").is_file() and (bad := _damaged(out)):
        again = "make them again with the erw prepare that made the cache"
        raise CacheError(f"{out}: damaged shards {', '.join(bad)}: {again}")
    return Cache.open(out)


def estimate(
    source: Source, out: str | Path, *, vae: Any, encoders: Sequence[Any], **options: Any
) -> str:
    """Images, classes, FLOPs and bytes of the cache that `prepare` would make with its options."""
    networks = Networks(vae, encoders, precision=options["precision"], device="cpu")
    hidden = ("precision", "batch_size", "device")
    options = {name: value for name, value in options.items() if name not in hidden}
    spec = cache_spec(source, networks, like=read_spec(Path(out).expanduser()), **options)
    flops = (spec.vae.flops + sum(encoder.flops for encoder in spec.encoders)) * (1 + spec.flip)
    images = "\n            ".join(overview(source))
    return (
        f"images      {images}\nshards      {spec.shards}\n"
        f"encoding    {flops / 1e9:.3f} GFLOP an image\n\n{size_table(spec)}"
    )


def read_spec(out: Path) -> CacheSpec | None:
    """The spec of the cache in `out`, finished or not, or None. Raises CacheError for damage."""
    path = out / SETTINGS
    if not path.exists():
        return Manifest.read(out).spec if (out / MANIFEST).exists() else None
    try:
        return CacheSpec.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} cannot be read ({error}): remove {out}, prepare anew") from error


@contextmanager
def _locked(out: Path, here: World, new: CacheSpec, *, adding: bool = False) -> Iterator[CacheSpec]:
    """Hold a cache's folder in the first rank. The agreed spec: the folder's, or `new` if it has
    none; with `adding` it takes up further encoders of `new`."""

    def agreed(old: CacheSpec) -> CacheSpec:
        more = {encoder.name: encoder for encoder in new.encoders}
        again = tuple(more.pop(encoder.name, encoder) for encoder in old.encoders)
        encoders = again if adding else (*again, *more.values())
        if changed := old.differences(replace(new, encoders=encoders)):
            raise CacheError(
                f"{out} was begun with other settings: {', '.join(changed)}; take another folder "
                "(--data.cache A B reads both as one), or add features with --add-encoder; source: "
                "its files or labels have changed, or --classes, --columns, --split or --subset"
            )
        return replace(old, encoders=(*old.encoders, *more.values()))

    with ExitStack() as stack:

        def begin() -> CacheSpec:
            known = {SETTINGS, MANIFEST, REJECTED, "shards"}
            others = any(p.name not in known for p in out.glob("[!.]*"))
            if read_spec(out) is None and (others or any(out.glob("shards/[!.]*"))):
                raise CacheError(f"{out} is no cache and not empty: choose another folder")
            if not stack.enter_context(lock(out / "shards" / ".lock")):
                raise CacheError(f"another process is preparing {out}: wait until it has finished")
            before = read_spec(out)
            spec = agreed(before) if before else new
            if spec != before:
                write_json(out / SETTINGS, asdict(spec))
            return spec

        yield here.broadcast(begin)


def _make(writer: Writer, here: World, *, progress: bool) -> Cache:
    """Make what is missing or damaged, join it, and report on it."""
    out, spec = writer.out, writer.spec
    if here.broadcast(partial(_whole, writer)):
        return Cache.open(out)
    indices = range(here.rank, spec.shards, here.size)
    total = sum(len(spec.span(index)) for index in indices if writer.missing(index))
    quiet = not (progress and here.first)
    with Progress(f"prepare {writer.source.name}", total, unit="images", quiet=quiet) as bar:
        for line in overview(writer.source):
            bar.say(line)
        writer.write(indices, bar)
    here.barrier()
    here.broadcast(partial(_join, writer))
    cache = Cache.open(out)
    if not quiet:
        rows, rejected = len(cache), cache.manifest.rejected
        size = sum(file.bytes for file in cache.manifest.files)
        say(f"{rows} images, {readable(size)}, {size / rows:.0f} bytes a row")
        say(f"{rejected} images rejected{f', reasons in {out / REJECTED}' if rejected else ''}")
    return cache


def _whole(writer: Writer) -> bool:
    """Whether the cache is finished and whole; damaged files are removed, to be made again."""
    out = writer.out
    if not (out / MANIFEST).exists() or Manifest.read(out).spec != writer.spec:
        return False
    bad = _damaged(out)
    for name in bad:
        say(f"{name} is damaged and is made again")
        (writer.folder / name).unlink(missing_ok=True)
    return not bad


def _damaged(out: str | Path) -> list[str]:
    return Cache([open_part(out)]).verify()  # `Cache.open` stops at the first file of a wrong size


def _join(writer: Writer) -> None:
    """Write rejected.jsonl and the manifest from the records of all shards."""
    out, source = writer.out, writer.source
    read = (Record.read(writer.folder, index) for index in range(writer.spec.shards))
    records = [record for record in read if record]
    assert len(records) == writer.spec.shards, "joined before all shards were there"
    rejected = sorted(tuple(row) for record in records for row in record.rejected)
    lines = [dict(zip(("item", "path", "reason"), row, strict=True)) for row in rejected]
    write_text(out / REJECTED, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    if not any(record.shard.rows for record in records):
        shutil.rmtree(writer.folder)  # so that other images may come here
        (out / SETTINGS).unlink()
        raise DataError(
            f"none of the {len(source)} images of {source.name} can be used: "
            f"{lines[0]['path']}: {lines[0]['reason']}; all reasons are in {out / REJECTED}"
        )
    Manifest.join(writer.spec, source.class_names, records).write(out)


def _local(out: str | Path) -> Path:
    if "://" in str(out):
        raise CacheError(f"a cache is made in a local folder, not at {out}: copy it there later")
    return Path(out).expanduser()
