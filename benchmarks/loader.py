"""Shuffled batches of moments and features: erw's cache beside REPA's `CustomDataset`.

    python benchmarks/loader.py --peer repa=PATH_TO_CLONE
    python benchmarks/loader.py --memory 10000 1000000      # peak memory by rows, sparse shards

erw reads moments (8 x 32 x 32, float16) and features (256 tokens of 768). REPA's loader, as its
`train.py` builds it, reads moments (.npy, float32) and the 256 px image (a plain PNG) from which
its step computes the features. The page cache is warm for both. They take turns; a turn of each is
one round, and ratios are taken within rounds.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erw.data import Cache, Loader, prefetch
from erw.data.manifest import (
    CacheSpec,
    EncoderSpec,
    File,
    Manifest,
    Shard,
    SourceSpec,
    VaeSpec,
    shard_file,
)
from erw.data.writer import write_columns
from record import add_peer, begun, beside_repa, write

LATENT, GRID, DIM, TEACHER = (4, 32, 32), (16, 16), 768, "teacher"
PER_SHARD = 1024
MEGABYTE = 1 << 20


def make_cache(folder: Path, rows: int, *, kind: str = "float16", sparse: bool = False) -> Cache:
    """A cache of these shapes. All shards are links to one; sparse ones hold zeros, on no disk."""
    encoder = EncoderSpec(TEACHER, "", DIM, GRID, 0, kind)
    spec = CacheSpec(
        source=SourceSpec("noise", "", rows), background=(255, 255, 255), crop="adm",
        image_size=256, rows_per_shard=PER_SHARD, precision="float32", seed=0, flip=False,
        images=False, latent_shape=LATENT, vae=VaeSpec("synthetic", "", 8, 1.0, 0.0, 0),
        encoders=(encoder,),
    )  # fmt: skip
    (folder / "shards").mkdir(parents=True)
    shards: list[Shard] = []
    first_of: dict[tuple[int, str], Path] = {}  # by rows and part
    for index, span in enumerate(spec.spans()):
        count, files = len(span), []
        for part in spec.columns():
            path = folder / "shards" / shard_file(index, part)
            if first := first_of.get((count, part)):
                os.link(first, path)
            else:
                write_rows(path, spec, part, rows=count, sparse=sparse)
                first_of[count, part] = path
            files.append(File(path.name, path.stat().st_size, ""))
        shards.append(Shard(index, count, tuple(files)))
    manifest = Manifest(spec, rows, 0, ("one",), (0.0,) * 4, (1.0,) * 4, tuple(shards))
    manifest.write(folder)
    return Cache.open(folder)


def write_rows(path: Path, spec: CacheSpec, part: str, *, rows: int, sparse: bool) -> None:
    """One file of a shard: noise, or (sparse) a hole of zeros that takes no disk."""
    draw, columns = torch.Generator().manual_seed(0), {}
    for name, (dtype, shape) in spec.columns()[part].items():
        few = 16 * torch.randn(64, *shape, generator=draw) * (name not in ("label", "item"))
        times = (-(-rows // 64), *[1] * len(shape))  # noise takes long to make
        columns[name] = few.to(getattr(torch, dtype)).repeat(times)[:rows]
    size = write_columns(path, columns).bytes
    if sparse:
        with open(path, "r+b") as file:
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
            file.truncate(size)


def make_peer(folder: Path, rows: int) -> None:
    """The layout that REPA's `dataset_tools.py` leaves: uncompressed PNGs, moments, one table.

    Rows after the first shardful are links to those, as they are on erw's side.
    """
    random = np.random.default_rng(0)
    labels = []
    for number in range(rows):
        names = [f"{n:08d}" for n in (number, number % PER_SHARD)]
        image, first_image = (folder / "images" / n[:5] / f"img{n}.png" for n in names)
        latent, first = (folder / "vae-sd" / n[:5] / f"img-mean-std-{n}.npy" for n in names)
        for path in (image, latent):
            path.parent.mkdir(parents=True, exist_ok=True)
        if number < PER_SHARD:
            pixels = Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8))
            pixels.save(image, compress_level=0)
            np.save(latent, random.standard_normal((2 * LATENT[0], *LATENT[1:]), np.float32))
        else:
            os.link(first_image, image)
            os.link(first, latent)
        labels.append([latent.relative_to(folder / "vae-sd").as_posix(), 0])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def ours(cache: Cache, batch: int, *, stored: bool = True, features: bool = True) -> Iterator[int]:
    """Rows as they come, one batch ahead, as in training."""
    loader = Loader(cache, seed=0, features=[TEACHER] if features else [], stored=stored)

    def fetch(step: int) -> Any:
        return loader.batch(range(step * batch, (step + 1) * batch))

    for found in prefetch(fetch, range(1 << 30), threads=cache.threads):
        yield len(found.labels)


def theirs(clone: Path, folder: Path, batch: int, workers: int) -> Iterator[int]:
    """REPA's dataset from the clone in a DataLoader with the settings of its train.py."""
    spec = importlib.util.spec_from_file_location("repa_dataset", clone / "dataset.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = module.CustomDataset(str(folder))
    loader = torch.utils.data.DataLoader(
        data, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    while True:
        for _, _, labels in loader:
            yield len(labels)


def cpu_seconds() -> float:
    """CPU seconds of this process and its loader's workers so far, those that have ended too."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total, tick = time.process_time() + ended.ru_utime + ended.ru_stime, os.sysconf("SC_CLK_TCK")
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def rates(stream: Iterator[int], seconds: float) -> dict[str, float]:
    """Samples a second and a CPU second, after first batches that start workers and threads."""
    for _ in range(3):
        next(stream)
    began, cpu, samples = time.monotonic(), cpu_seconds(), 0
    while (spent := time.monotonic() - began) < seconds:
        samples += next(stream)
    return {"wall": samples / spent, "cpu": samples / (cpu_seconds() - cpu)}


def peak_memory(rows: int, batch: int, seconds: float) -> dict[str, int]:
    """Peak MB of a process that reads a sparse cache of so many rows for a while."""
    with tempfile.TemporaryDirectory() as folder:
        make_cache(Path(folder) / "cache", rows, sparse=True)
        command = [sys.executable, __file__, "--child", f"{folder}/cache", "--batch", str(batch)]
        command += ["--seconds", str(seconds)]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(out.stdout)


def watched(stream: Iterator[int], most: dict[str, int]) -> Iterator[int]:
    """The stream, and in `most` the largest MB seen: memory of its own, and pages of files too.

    Those of the shards are mapped: they are the system's page cache, which it takes back at will.
    """
    names = {"RssAnon": "its own", "VmRSS": "with mapped pages of shards"}
    for found in stream:
        for line in Path("/proc/self/status").read_text().splitlines():
            if name := names.get(line.partition(":")[0]):
                most[name] = max(most.get(name, 0), int(line.split()[1]) * 1024 // MEGABYTE)
        yield found


def contenders(root: Path, args: argparse.Namespace) -> dict[str, Callable[[], Iterator[int]]]:
    """What takes part, on data made below `root`."""
    whole = make_cache(root / "float16", args.rows)
    small = make_cache(root / "int8", args.rows, kind="int8")
    found: dict[str, Callable[[], Iterator[int]]] = {}
    if args.peer:
        make_peer(root / "repa", args.rows)
        found["repa"] = partial(theirs, args.peer, root / "repa", args.batch, args.workers)
    return found | {
        "erw int8": partial(ours, small, args.batch),
        "erw float16": partial(ours, whole, args.batch),
        "erw float16, unpacked to float32 on the CPU": partial(
            ours, whole, args.batch, stored=False
        ),
        "erw, moments alone": partial(ours, whole, args.batch, features=False),
    }


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender: samples a second by both clocks, and ratios to REPA."""
    with tempfile.TemporaryDirectory() as folder:
        sides = contenders(Path(folder), args)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name, start in sides.items():
                found[name].append(rates(start(), args.seconds))
                told = {clock: round(value) for clock, value in found[name][-1].items()}
                print(f"round {number + 1} {name:<48} {told}", file=sys.stderr)
    return beside_repa(found, "samples")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_peer(parser)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="of reading, each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4, help="of REPA's DataLoader")
    parser.add_argument("--memory", type=int, nargs="*", metavar="ROWS", default=())
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--child", metavar="CACHE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        most: dict[str, int] = {}
        stream = ours(Cache.open(args.child), args.batch, stored=False)
        rates(watched(stream, most), args.seconds)
        print(json.dumps(most))
        return
    record = begun(
        "samples a second and a CPU second (all threads and workers), median (min to max)",
        clone=args.peer, out=args.out,
    )  # fmt: skip
    record |= {
        "erw reads": "moments 8 x 32 x 32 float16, 256 tokens of 768; read one batch ahead, "
        "handed over as stored (a GPU unpacks it) unless said otherwise",
        "repa reads": f"moments float32 (.npy), image 256 px (PNG); {args.workers} workers; no "
        "features: its step computes them from the image",
    }
    if args.memory:
        record["peak MB by rows"] = {
            str(rows): peak_memory(rows, args.batch, args.seconds) for rows in args.memory
        }
    else:
        record["rows"] = compare(args)
    print(json.dumps(record, indent=1))
    write(record, args.out)


if __name__ == "__main__":
    main()
