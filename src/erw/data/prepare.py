"""Images to a cache, once: decode, crop, encode, write. The same command resumes and mends."""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from erw.data.cache import Cache, open_part
from erw.data.manifest import MANIFEST, REJECTED, SETTINGS, CacheSpec, Manifest, Record, readable
from erw.data.networks import Networks, cache_spec, encoder_specs
from erw.data.sources import Source, open_source, overview
from erw.data.writer import Writer
from erw.dist import current, world
from erw.errors import CacheError, DataError, raised_as
from erw.io import lock, write_json, write_text
from erw.log import say


@world()
def prepare(
    source: Source | str | Path, out: str | Path, *, vae: Any, encoders: Sequence[Any] = (),
    image_size: int, batch_size: int = 64, features: str | None = None, class_token: bool = False,
    flip: bool = False, images: bool = False, rows_per_shard: int = 1024,
    precision: str = "float32", seed: int = 0, device: str = "cpu", progress: bool = True,
) -> Cache:  # fmt: skip
    """Encode a source (see `open_source`) into a cache folder and open it.

    Running it again makes what is missing or damaged. Under torchrun each rank makes its share of
    the shards, to the same bytes as one process. VAE and encoders are objects or names;
    `erw.cli.prepare.Prepare` explains the settings.

    Raises CacheError where `out` has other settings or is in use, ConfigError for a setting that
    is impossible, DataError and FileNotFoundError as `open_source`.
    """
    source, out = open_source(source), _local(out)
    networks = Networks(vae, encoders, precision=precision, device=device)
    spec = cache_spec(
        source, networks, image_size=image_size, rows_per_shard=rows_per_shard,
        features=features, class_token=class_token, like=read_spec(out), seed=seed, flip=flip,
        images=images,
    )  # fmt: skip
    return _make(Writer(out, spec, source, networks, batch_size), progress=progress)


def prepare_builtin(
    out: str | Path, *, image_size: int = 64, count: int = 50_000, groups: Sequence[str] = (),
    **options: Any,
) -> Cache:  # fmt: skip
    """The cache of the quickstart recipes, as `erw prepare openmoji --out OUT` makes it; nothing is
    downloaded. `groups`: classes of it, all if empty; `options`: of `prepare`."""
    source = open_source("openmoji", size=image_size, count=count, groups=groups)
    options = {"vae": "openmoji-f4c4", "encoders": ("efficientnet-lite0",)} | options
    return prepare(source, out, image_size=image_size, **options)


def complete_builtin(
    out: Path, *, count: int, encoders: Sequence[str] = (), class_token: bool = False,
    groups: Sequence[str] = (),
) -> Cache:  # fmt: skip
    """The cache of `prepare_builtin` with the features of these encoders: made, finished or added
    to where something is missing. One that is there keeps its number of images."""
    from erw.encoders import load_encoder

    spec = read_spec(out)
    count = spec.source.count if spec else count
    try:
        cache: Cache | None = Cache.open(out)
    except CacheError:
        cache = None
    # Loaded first: what cannot be, such as a run that is not there, is said before any work.
    present = () if cache is None else cache.features
    missing = [load_encoder(x) for x in dict.fromkeys(encoders) if x not in present]
    if cache is None:
        say(f"{out} is missing or not finished: preparing {count:,} of the built-in images")
        cache = prepare_builtin(out, count=count, class_token=class_token, groups=groups)
    if missing := [encoder for encoder in missing if encoder.name not in cache.features]:
        say(f"adding features of {', '.join(encoder.name for encoder in missing)} to {out}")
        source = open_source("openmoji", size=cache.image_size, count=count, groups=groups)
        cache = add_encoders(source, out, encoders=missing)
    return cache


@world()
def add_encoders(
    source: Source | str | Path, out: str | Path, *, encoders: Sequence[Any],
    features: str | None = None, class_token: bool = False, batch_size: int = 64,
    device: str = "cpu", progress: bool = True,
) -> Cache:  # fmt: skip
    """Add features of more encoders to a finished cache and open it.

    The cache stays readable meanwhile, and then is as if it had always had them. Running it again
    resumes. `source` is what the cache was made of: other images raise CacheError. The rest is as
    for `prepare`.
    """
    source, out = open_source(source), _local(out)
    before = open_part(out).manifest.spec
    images = replace(before.source, fingerprint=source.fingerprint(), count=len(source))
    networks = Networks(None, encoders, precision=before.precision, device=device)
    added = encoder_specs(source, networks, before.image_size, features, class_token, like=before)
    spec = replace(before, source=images, encoders=added)
    return _make(Writer(out, spec, source, networks, batch_size), adding=True, progress=progress)


def verify(out: str | Path) -> Cache:
    """Rehash every file of a finished cache and open it. Raises CacheError for damaged ones."""
    cache = Cache.open(out)
    if bad := cache.verify():
        again = "make them again with the erw prepare that made the cache"
        raise CacheError(f"{out}: damaged shards {', '.join(bad)}: {again}")
    return cache


def estimate(
    source: Source, out: str | Path, *, vae: Any, encoders: Sequence[Any], **options: Any
) -> str:
    """Images, classes, FLOPs and bytes of the cache that `prepare` would make with its options."""
    run = {name: options.pop(name) for name in ("precision", "device")}
    networks = Networks(vae, encoders, **run)
    del options["batch_size"]  # it changes no size
    spec = cache_spec(source, networks, like=read_spec(Path(out).expanduser()), **options)
    flops = (spec.vae.flops + sum(encoder.flops for encoder in spec.encoders)) * (1 + spec.flip)
    lines = ["images      " + "\n            ".join(overview(source))]
    lines.append(f"shards      {len(spec.spans())}")
    lines.append(f"encoding    {flops / 1e9:.3f} GFLOP an image\n")
    sizes = spec.row_bytes()
    for name, size in (sizes | {"all": sum(sizes.values())}).items():
        total = readable(size * len(source))
        lines.append(f"{name:<34}{size:>12,} bytes an image{total:>14}")
    return "\n".join(lines)


def read_spec(out: Path) -> CacheSpec | None:
    """The spec of the cache in `out`, finished or not, or None. Raises CacheError for damage."""
    path = out / SETTINGS
    if not path.exists():
        return open_part(out).manifest.spec if (out / MANIFEST).exists() else None
    with raised_as(CacheError, f"{path} cannot be read: remove {out}, prepare anew"):
        return CacheSpec.from_json(json.loads(path.read_text()))


def _make(writer: Writer, *, adding: bool = False, progress: bool) -> Cache:
    processes, out = current(), writer.out
    with ExitStack() as stack:
        spec = processes.broadcast(partial(_begin, writer, stack, adding=adding))
        writer = replace(writer, spec=spec)
        if processes.broadcast(partial(_whole, writer)):
            return Cache.open(out)
        quiet = not (progress and processes.first)
        writer.write(processes, quiet=quiet)
        processes.barrier()
        processes.broadcast(partial(_join, writer))
        cache = Cache.open(out)
    if not quiet:
        rows, rejected = len(cache), cache.manifest.rejected
        size = sum(file.bytes for file in cache.manifest.files)
        say("\n".join([*overview(cache), f"{readable(size)}, {size / rows:.0f} bytes a row"]))
        for name in (name for name in cache.features if "#" not in name):
            near = cache.statistics(name).nearness
            hint = "; so near it is no target: align with normalize images" * (near > 0.9)
            say(f"features of {name} have a cosine of {near:.3f} to their mean{hint}")
        say(f"{rejected} images rejected{f', reasons in {out / REJECTED}' if rejected else ''}")
    return cache


def _begin(writer: Writer, stack: ExitStack, *, adding: bool) -> CacheSpec:
    """Hold the folder within `stack`. The agreed spec: the folder's, or the writer's if it has
    none; with `adding` it takes up further encoders of the writer's."""
    out, spec = writer.out, writer.spec
    ours = {SETTINGS, MANIFEST, REJECTED, "shards"}
    others = any(p.name not in ours for p in out.glob("[!.]*"))
    if read_spec(out) is None and (others or any(out.glob("shards/[!.]*"))):
        raise CacheError(f"{out} is no cache and not empty: choose another folder")
    if not stack.enter_context(lock(out / "shards" / ".lock")):
        raise CacheError(f"another process is preparing {out}: wait until it has finished")
    if old := read_spec(out):
        more = {encoder.name: encoder for encoder in spec.encoders}
        encoders = tuple(more.pop(encoder.name, encoder) for encoder in old.encoders)
        encoders += () if adding else tuple(more.values())
        if changed := old.differences(replace(spec, encoders=encoders)):
            raise CacheError(
                f"{out} was begun with other settings: {', '.join(changed)}; take another folder "
                "(--data.cache A B reads both as one), or add features with --add-encoder; source: "
                "its files or labels have changed, or --classes, --columns, --split or --subset"
            )
        spec = replace(old, encoders=(*old.encoders, *more.values()))
    if spec != old:
        write_json(out / SETTINGS, asdict(spec))
    return spec


def _whole(writer: Writer) -> bool:
    """Whether the cache is finished and whole; damaged files are removed, to be made again."""
    out = writer.out
    if not (out / MANIFEST).exists() or (part := open_part(out)).manifest.spec != writer.spec:
        return False
    bad = Cache([part]).verify()  # `Cache.open` stops at the first file of a wrong size
    for name in bad:
        say(f"{name} is damaged and is made again")
        (writer.folder / name).unlink(missing_ok=True)
    return not bad


def _join(writer: Writer) -> None:
    """Write rejected.jsonl and the manifest from the records of all shards."""
    out, source, spec = writer.out, writer.source, writer.spec
    shards = range(len(spec.spans()))
    records = [record for index in shards if (record := Record.read(writer.folder, index))]
    assert len(records) == len(shards), "joined before all shards were there"
    rejected = [row for record in records for row in record.rejected]
    rows = (dict(zip(("item", "path", "reason"), row, strict=True)) for row in rejected)
    write_text(out / REJECTED, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows))
    sums = [record.latent_sums for record in records if record.shard.rows]
    if not sums:
        shutil.rmtree(writer.folder)  # so that other images may come here
        (out / SETTINGS).unlink()
        problem = f"none of the {len(source)} images of {source.name} can be used"
        raise DataError(f"{problem}: {': '.join(rejected[0][1:])}; all reasons: {out / REJECTED}")
    *totals, (count,) = ([sum(x) for x in zip(*s, strict=True)] for s in zip(*sums, strict=True))
    mean, square = ([x / count for x in total] for total in totals)
    std = tuple(max(0.0, b - a * a) ** 0.5 for a, b in zip(mean, square, strict=True))
    if spec.vae.scale is None and min(std) < 1e-6:  # at the least log-variance of a VAE
        constant = f"channel {std.index(min(std))} of the latents is the same everywhere"
        raise CacheError(f"{constant}: VAE {spec.vae.name} cannot be scaled by their deviation")
    parts, classes = tuple(record.shard for record in records), tuple(source.class_names)
    number, counts = sum(part.rows for part in parts), source.class_counts([x[0] for x in rejected])
    if (out / MANIFEST).exists() and (old := open_part(out).manifest).spec == spec:
        counts = old.class_counts and counts  # one of an older erw stays as it was when mended
    Manifest(spec, number, len(rejected), classes, tuple(mean), std, parts, counts).write(out)


def _local(out: str | Path) -> Path:
    if "://" in str(out):
        raise CacheError(f"a cache is made in a local folder, not at {out}: copy it there later")
    return Path(out).expanduser()
