"""Images to a cache, once: decode, crop, encode, write. The same command resumes and mends."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
    SourceSpec,
    join,
    readable,
    size_table,
)
from erw.data.networks import Networks, cache_spec, encoder_specs
from erw.data.sources import Source, open_source, overview
from erw.data.writer import StoredImages, Writer
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
    crop: str = "adm",
    features: str | None = None,
    class_token: bool = False,
    flip: bool = False,
    images: bool = False,
    rows_per_shard: int = 1024,
    precision: str = "float32",
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Cache:
    """Encode a source into a cache folder and open it.

    Running it again makes the shards that are missing or damaged. Under torchrun each rank makes
    its share of the shards and the first joins them, to the same bytes as one process.

    Args:
        source: see `open_source`.
        out: the cache's folder, new or begun with the same settings.
        vae, encoders: objects, or names for `load_vae` and `load_encoder`.
        image_size: side of the cropped square, a multiple of the VAE's factor.
        batch_size: images encoded at once; batches never cross shards.
        crop: one of `CROPS`. `seed` moves only random crops.
        features: how features are stored: float16, bfloat16, or int8 with a scale per token.
            None: as the cache has them, or float16.
        class_token: store the class token of every encoder that has one too, in float16.
        flip: store the mirrored image's moments and features as a second variant.
        images: store the cropped uint8 images too, as a reference for evaluation.
        rows_per_shard: source items per shard; one shard is in memory at a time.
        precision: "float32", or "bfloat16" to encode under autocast.
        workers: threads that decode and crop; by default one per core, at most 8.
        strict: stop at the first bad image instead of listing it in rejected.jsonl.
        progress: show a bar, and the report at the end.

    Raises:
        CacheError: `out` was made with other settings, is in use, or the disk is full.
        ConfigError: a setting is impossible.
        DataError, FileNotFoundError: as `open_source`.
    """
    source, out = open_source(source), _local(out)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected at least 1")
    with world() as here:
        networks = Networks(vae, encoders, precision=precision, device=device)
        spec = cache_spec(
            source, networks, image_size=image_size, crop=crop, rows_per_shard=rows_per_shard,
            features=features, class_token=class_token, like=read_spec(out), seed=seed, flip=flip,
            images=images,
        )  # fmt: skip
        with _locked(out, here, partial(_agree, out, spec)) as spec:
            writer = Writer(
                out, spec, source, networks, batch_size=batch_size, workers=workers, strict=strict
            )
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
    source: Source | str | Path | None,
    out: str | Path,
    *,
    encoders: Sequence[Any],
    features: str | None = None,
    class_token: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
    workers: int | None = None,
    progress: bool = True,
) -> Cache:
    """Add features of more encoders to a finished cache and open it.

    The cache stays readable meanwhile, and then is as if it had always had them. Running it again
    resumes.

    Args:
        source: the images that the cache was made of. None: those in its rows, if it was made with
            `images`.
        out, encoders, features, class_token, batch_size, device, workers, progress: as for
            `prepare`; the rest is as the cache has it.

    Raises:
        CacheError: the images are others, or the cache is not finished.
    """
    out = _local(out)
    before = Manifest.read(out).spec
    if source is None and not before.images:
        raise CacheError(f"{out} holds no images: give those that it was made of again")
    given: Any = StoredImages(Cache.open(out)) if source is None else open_source(source)
    if source is not None and SourceSpec.of(given) != before.source:
        raise CacheError(
            f"{given.name} ({len(given)} images) is not what {out} was made of, or has changed "
            f"since: expected {before.source.name} ({before.source.count} images)"
        )
    with world() as here:
        networks = Networks(None, encoders, precision=before.precision, device=device)
        new = encoder_specs(
            networks, image_size=before.image_size, features=features, class_token=class_token,
            like=before,
        )  # fmt: skip

        def agree(old: CacheSpec | None) -> CacheSpec:
            old = old or before
            again = {encoder.name: encoder for encoder in new}
            alike = tuple(again.pop(encoder.name, encoder) for encoder in old.encoders)
            if changed := old.differences(replace(old, encoders=alike)):
                raise CacheError(f"{out} has other features already: {', '.join(changed)}")
            return replace(old, encoders=(*old.encoders, *again.values()))

        with _locked(out, here, agree) as spec:
            writer = Writer(out, spec, given, networks, batch_size=batch_size, workers=workers)
            return _make(writer, here, progress=progress)


def verify(out: str | Path) -> Cache:
    """Rehash every file of a finished cache and open it.

    Raises:
        CacheError: the damaged files, or that the cache is unfinished.
    """
    if not (Path(out).expanduser() / "online.json").is_file() and (bad := _damaged(out)):
        names = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
        raise CacheError(
            f"{out}: damaged shards {names}: make them again with the erw prepare that made the "
            "cache"
        )
    return Cache.open(out)


def estimate(
    source: Source, out: str | Path, *, vae: Any, encoders: Sequence[Any], **options: Any
) -> str:
    """Images, classes, FLOPs and bytes of the cache that `prepare` would make with its options."""
    networks = Networks(vae, encoders, precision=options.pop("precision"), device="cpu")
    for name in ("batch_size", "workers", "device", "strict"):  # they do not show in the cache
        options.pop(name, None)
    spec = cache_spec(source, networks, like=read_spec(Path(out).expanduser()), **options)
    flops = (spec.vae.flops + sum(encoder.flops for encoder in spec.encoders)) * (1 + spec.flip)
    images = "\n            ".join(overview(source))
    return (
        f"images      {images}\nshards      {spec.shards}\n"
        f"encoding    {flops / 1e9:.3f} GFLOP an image\n\n{size_table(spec)}"
    )


def read_spec(out: Path) -> CacheSpec | None:
    """The spec of the cache in `out`, finished or not, or None.

    Raises:
        CacheError: it cannot be read.
    """
    path = out / SETTINGS
    if not path.exists():
        return Manifest.read(out).spec if (out / MANIFEST).exists() else None
    try:
        return CacheSpec.from_json(json.loads(path.read_text()))
    except CacheError as error:
        raise CacheError(f"{out}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}): remove {out}, prepare again") from error


@contextmanager
def _locked(
    out: Path, here: World, agree: Callable[[CacheSpec | None], CacheSpec]
) -> Iterator[CacheSpec]:
    """Hold a cache's folder in the first rank, which writes what `agree` makes of its spec."""
    with ExitStack() as stack:

        def begin() -> CacheSpec:
            known = {SETTINGS, MANIFEST, REJECTED, "shards"}
            others = any(p.name not in known for p in out.glob("[!.]*"))
            if read_spec(out) is None and (others or any(out.glob("shards/[!.]*"))):
                raise CacheError(f"{out} is no cache and not empty: choose another folder")
            if not stack.enter_context(lock(out / "shards" / ".lock")):
                raise CacheError(f"another process is preparing {out}: wait until it has finished")
            before = read_spec(out)
            spec = agree(before)
            if (out / MANIFEST).exists() and len(Manifest.read(out).shards) != spec.shards:
                raise CacheError(
                    f"{out} was grown with --append by an earlier version: it can be read but not "
                    "changed; prepare its images anew in other folders"
                )
            if spec != before:
                write_json(out / SETTINGS, spec.to_json())
            return spec

        yield here.broadcast(begin)


def _agree(out: Path, new: CacheSpec, before: CacheSpec | None) -> CacheSpec:
    """The spec of the cache in `out`, which `new` begins or must match."""
    if before is None:
        return new
    names = [encoder.name for encoder in new.encoders]
    named = tuple(encoder for encoder in before.encoders if encoder.name in names)
    changed = replace(before, encoders=named).differences(new)
    if not changed:
        return before
    hint = f"choose another folder or remove {out}"
    if all(change.startswith("encoders") for change in changed):
        hint += ", or add an encoder to it with --add-encoder"
    elif all(change.startswith("source.") for change in changed):
        hint = (
            "its files or labels have changed, or --classes, --columns, --split or --subset have; "
            "prepare other images in another folder (--data.cache A B reads both as one)"
        )
    raise CacheError(f"{out} was begun with other settings: {', '.join(changed)}; {hint}")


def _make(writer: Writer, here: World, *, progress: bool) -> Cache:
    """Make what is missing or damaged, join it, and report on it."""
    out, spec = writer.out, writer.spec
    if here.broadcast(partial(_whole, writer)):
        cache = Cache.open(out)
        if writer.strict and (rejected := cache.manifest.rejected):
            raise DataError(
                f"{out} was made without {rejected} images that cannot be read, listed in "
                f"{out / REJECTED}: mend them and make another, or leave out --strict"
            )
        return cache
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
        if rejected:
            say(f"{rejected} images rejected, reasons in {out / REJECTED}")
    return cache


def _whole(writer: Writer) -> bool:
    """Whether the cache is finished and whole; damaged files are removed, to be made again."""
    out = writer.out
    if not (out / MANIFEST).exists() or Manifest.read(out).spec != writer.spec:
        return False
    bad = _damaged(out)
    for name in bad:
        say(f"{out}: making {name} again, which is damaged")
        (writer.folder / name).unlink(missing_ok=True)
    return not bad


def _damaged(out: str | Path) -> list[str]:
    return Cache([open_part(out)]).verify()  # `Cache.open` stops at the first file of a wrong size


def _join(writer: Writer) -> None:
    """Write rejected.jsonl and the manifest from the records of all shards."""
    out, source = writer.out, writer.source
    read = (Record.read(writer.folder, index) for index in range(writer.spec.shards))
    records = [record for record in read if record]
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
    join(writer.spec, source.class_names, records).write(out)


def _local(out: str | Path) -> Path:
    if "://" in str(out):
        raise CacheError(f"a cache is made in a local folder, not at {out}: copy it there later")
    return Path(out).expanduser()
