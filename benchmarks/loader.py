"""Shuffled batches of moments and features: erw's cache against REPA's `CustomDataset`, in one run.

    python benchmarks/loader.py --peer repa=PATH_OF_A_CLONE [--rows 4096] [--seconds 20]
    python benchmarks/loader.py --memory 10000 1000000      # peak memory by rows, sparse shards

erw reads moments (8 x 32 x 32) and features (256 tokens of 768, float16); REPA's loader, as its
`train.py` builds it, reads an image of 256 px (uncompressed PNG, from which the teacher's features
are computed in every step) and moments (.npy). Both see synthetic data of these shapes, in this
process one after the other, `--rounds` times in turn; the page cache is warm for both. The last
line is JSON. Run it on an idle machine.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from erw.data import Cache, Loader, prefetch
from erw.data.manifest import Manifest, Shard
from erw.data.shards import Column, Written, write_shard

LATENT, GRID, DIM, TEACHER = (4, 32, 32), (16, 16), 768, "teacher"
PER_SHARD = 1024
MEGABYTE = 1 << 20


def make_cache(folder: Path, rows: int, *, sparse: bool) -> Cache:
    """A cache of these shapes. All shards are links to one; sparse ones hold zeros, on no disk."""
    (folder / "shards").mkdir(parents=True)
    random = np.random.default_rng(0)
    shards, known = [], {}
    for index, first in enumerate(range(0, rows, PER_SHARD)):
        count = min(PER_SHARD, rows - first)
        path = folder / "shards" / f"{index:05d}.safetensors"
        if count in known:
            source, size = known[count]
            os.link(source, path)
        else:
            size = write_rows(path, count, random=None if sparse else random)
            known[count] = path, size
        shards.append(Shard(index, first, count, count, (Written(path.name, size, ""),)))
    settings = {
        "image_size": 256, "flip": False, "images": False,
        "vae": {"name": "synthetic", "scale": 1.0, "shift": 0.0, "factor": 8, "weight_hash": ""},
        "encoders": [{"name": TEACHER, "dim": DIM, "grid": GRID, "flops": 0, "weight_hash": "",
                      "format": "float16"}],
    }  # fmt: skip
    manifest = Manifest(
        1, settings, rows, 0, ("one",), (rows,), LATENT, (0.0,) * 4, (1.0,) * 4, {}, tuple(shards)
    )
    manifest.write(folder)
    return Cache.open(folder)


def write_rows(path: Path, rows: int, *, random: np.random.Generator | None) -> int:
    """One shard, of noise or (without `random`) all holes; its size in bytes."""
    shapes = {
        "moments": ("float16", (2 * LATENT[0], *LATENT[1:])),
        f"features.{TEACHER}": ("float16", (GRID[0] * GRID[1], DIM)),
    }
    columns = {"label": Column("int32", np.zeros(rows, np.int32))}
    columns["item"] = Column("int64", np.arange(rows))
    for name, (kind, shape) in shapes.items():
        if random is None:
            values = np.zeros((rows, *shape), kind)
        else:
            values = random.standard_normal((rows, *shape), np.float32).astype(kind)
        columns[name] = Column(kind, values)
    size = write_shard(path, columns).bytes
    if random is None:
        with open(path, "r+b") as file:  # keep the header, let the rest be a hole
            length = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(length)
            file.truncate(size)
    return size


def make_peer(folder: Path, rows: int) -> None:
    """The layout that REPA's `dataset_tools.py` leaves: uncompressed PNGs, moments, one table."""
    random = np.random.default_rng(0)
    labels = []
    for number in range(rows):
        inside = f"{number:08d}"[:5]
        for part in ("images", "vae-sd"):
            (folder / part / inside).mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        pixels.save(folder / "images" / inside / f"img{number:08d}.png", compress_level=0)
        name = f"{inside}/img-mean-std-{number:08d}.npy"
        moments = random.standard_normal((2 * LATENT[0], *LATENT[1:]), np.float32)
        np.save(folder / "vae-sd" / name, moments)
        labels.append([name, 0])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def ours(cache: Cache, batch: int) -> Iterator[int]:
    """Rows as they come, one batch ahead."""
    loader = Loader(cache, seed=0, features=[TEACHER])
    for found in prefetch(lambda step: loader.batch(step * batch, batch), range(1 << 30)):
        yield len(found.labels)


def theirs(clone: Path, folder: Path, batch: int, workers: int) -> Iterator[int]:
    """REPA's dataset from the clone in a DataLoader with the settings of its train.py."""
    spec = importlib.util.spec_from_file_location("repa_dataset", clone / "dataset.py")
    if spec is None or spec.loader is None or not (clone / "dataset.py").exists():
        raise SystemExit(f"error: {clone} has no dataset.py: expected a clone of sihyun-yu/REPA")
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


def rate(stream: Iterator[int], seconds: float) -> float:
    """Samples a second, after a first batch that starts workers and threads."""
    next(stream)
    began, samples = time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        samples += next(stream)
    return samples / spent


def peak_memory(rows: int, batch: int, seconds: float) -> float:
    """MB of a process of its own that reads a sparse cache of so many rows for a while."""
    with tempfile.TemporaryDirectory() as folder:
        make_cache(Path(folder) / "cache", rows, sparse=True)
        command = [sys.executable, __file__, "--child", f"{folder}/cache", "--batch", str(batch)]
        command += ["--seconds", str(seconds)]
        out = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(out.stdout.split()[-1])


def child(path: str, batch: int, seconds: float) -> None:
    rate(ours(Cache.open(path), batch), seconds)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", metavar="repa=PATH", help="a clone of sihyun-yu/REPA")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0, help="of reading, each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4, help="of REPA's DataLoader")
    parser.add_argument("--memory", type=int, nargs="*", metavar="ROWS", default=())
    parser.add_argument("--child", metavar="CACHE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.batch, args.seconds)
        return
    report: dict[str, object] = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
    for rows in args.memory:
        report[f"peak MB at {rows} rows"] = round(peak_memory(rows, args.batch, args.seconds))
    if not args.memory:
        report |= {"rows": args.rows, "batch": args.batch, **compare(args)}
    print("\n".join(f"{name:<24}{value}" for name, value in report.items()))
    print(json.dumps(report))


def compare(args: argparse.Namespace) -> dict[str, object]:
    """Median samples a second of both, in turn, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        cache = make_cache(root / "cache", args.rows, sparse=False)
        sides: dict[str, Callable[[], Iterator[int]]] = {"erw": lambda: ours(cache, args.batch)}
        if args.peer:
            name, _, clone = args.peer.partition("=")
            if name != "repa" or not clone:
                raise SystemExit("error: --peer: expected repa=PATH, a clone of sihyun-yu/REPA")
            make_peer(root / "repa", args.rows)
            sides["repa"] = lambda: theirs(Path(clone), root / "repa", args.batch, args.workers)
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, start in sides.items():
                found[name].append(rate(start(), args.seconds))
    report: dict[str, object] = {f"{k} samples/s": round(median(v)) for k, v in found.items()}
    report |= {f"{k} spread": [round(x) for x in v] for k, v in found.items()}
    if "repa" in found:
        report["erw over repa"] = round(median(found["erw"]) / median(found["repa"]), 2)
    return report


if __name__ == "__main__":
    main()
