"""Where the time of a training step goes, and how near it comes to what the device can do.

    bench(recipe("sit_b2_in256_erw"))      # needs no cache: rows are made up

Model FLOPs utilisation is the FLOPs that the ledger counts for a step over those of matrix products
that the same device does in the same time, measured beside it: the fastest of the step's own shape
and of square ones.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from erw.config import Run
from erw.data.cache import Batch
from erw.data.manifest import EncoderSpec
from erw.dist import World, current
from erw.training.flops import Ledger
from erw.training.loop import Trainer
from erw.training.objective import build_objective
from erw.training.peers import build_peer, importing, weights_of

NONE: Mapping[str, Path] = {}
PARTS = ("data", "forward", "backward", "optimizer", "ema")
"""Of a step: reading its rows; network and losses; gradients and their clipping; AdamW; EMA."""


class MadeUp:
    """As a cache: random rows in memory, of the shapes that a resolved run reads.

    Args:
        dims: width of each encoder's features, whose tokens lie as the model's.
        data: raw rows in place of random ones.
    """

    spec, threads, encoded = SimpleNamespace(flip=False), 1, 1
    address, class_names, vae = "made-up rows", (), {"name": "none"}

    def __init__(self, run: Run, dims: Mapping[str, int], *, data: Batch | None = None) -> None:
        model, count = run.model, run.data.batch_size
        channels, size = model.channels or 4, model.input_size or 32
        grid, classes = size // model.patch, model.num_classes or 0
        self.latent_shape, self.num_classes = (channels, size, size), classes
        self.features = {
            name: EncoderSpec(name, "", dim, (grid, grid), 0, "float32", model.class_dim or 0)
            for name, dim in dims.items()
        }
        rng = torch.Generator().manual_seed(0)
        normal: Callable[..., Tensor] = partial(torch.randn, generator=rng)
        mean = normal(count, *self.latent_shape)
        features = tuple(normal(count, grid * grid, dim) for dim in dims.values())
        labels = torch.randint(max(1, classes), (count,), generator=rng)
        token = normal(count, model.class_dim) if model.class_dim else None
        self.data = data or Batch(mean, torch.full_like(mean, 0.1), labels, features, token)

    def __len__(self) -> int:
        return len(self.data.labels)

    def require(self, **_: Any) -> None:
        """Whatever is asked for is there."""

    def read(self, rows: Any, *, features: Sequence[str] = (), **_: Any) -> Batch:
        """The first rows, as many as asked for: their order does not matter to a clock."""
        batch = self.data.rows(slice(0, len(rows)))
        return batch if features else batch._replace(features=())


def bench(
    run: Run, cache: Any, ledger: Ledger, *, steps: int = 10, peers: Mapping[str, Path] = NONE
) -> dict[str, Any]:
    """The record of a resolved run's steps on this device.

    Args:
        cache: a `Cache`, or `MadeUp` rows.
        steps: timed of each phase, after three that are not.
        peers: clones of others' code by name (`erw.training.peers`), whose steps take turns with
            ours of full training, from the same weights and on the same batch.

    The record has `device`, `dtype`, `peak` (FLOP/s of products), `memory` (bytes at most) and for
    each of `phases`: `seconds` a step (median, least, most), `images` a second, `flops` a step,
    `utilisation` (0 to 1), and `parts`, seconds of each of `PARTS` with the device waited for in
    between; and for each of `peers` its `seconds` and `ours` a step, and `times` that ours is as
    fast, taken within a turn.
    """
    world = current()
    trainer = Trainer(run, cache, world, Path("none"), {}, build_objective(run, cache))
    shape = (run.data.batch_size * trainer.model.tokens, run.model.width, 4 * run.model.width)
    most = peak(world.device, trainer.dtype, shape)
    plan, phases = run.plan, dict[str, Any]()
    with trainer.threaded():
        for step in sorted({0, plan.warmup} if plan.warmup else {0}):
            phase, rate = run.phase(step), ledger.rate(step)
            flops = plan.batch(step, run.data.batch_size) * rate.trained + rate.own
            trainer.enter(phase)
            whole = [_seconds(trainer, step, world) for _ in range(steps + 3)][3:]
            median = statistics.median(whole)
            phases[phase.name] = {
                "seconds": [median, min(whole), max(whole)],
                "images": plan.batch(step, run.data.batch_size) * world.size / median,
                "flops": flops,
                "utilisation": flops / world.size / median / most,
                "parts": _parts(trainer, step, world, steps),
            }
    compared = {name: _beside(trainer, name, clone, steps) for name, clone in peers.items()}
    return {
        "device": _name(world), "processes": world.size, "dtype": str(trainer.dtype), "peak": most,
        "memory": memory(world.device), "phases": phases, "peers": compared,
    }  # fmt: skip


def _beside(trainer: Trainer, name: str, clone: Path, steps: int) -> dict[str, list[float]]:
    """Steps of a peer and ours in turns."""
    run, world = trainer.run, trainer.processes
    at = run.plan.warmup
    times: list[tuple[float, float]] = []
    with importing(clone), trainer.threaded():
        peer = build_peer(name, clone, run, trainer.read(at).to(world.device), trainer.dtype)
        trainer.model.load_state_dict(weights_of(peer.model))
        trainer.enter(run.phase(at))
        for _ in range(steps + 3):
            _wait(world.device)
            begin = time.perf_counter()
            peer.step()
            _wait(world.device)
            times.append((time.perf_counter() - begin, _seconds(trainer, at, world)))
    theirs, ours = zip(*times[3:], strict=True)
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    values = {"seconds": theirs, "ours": ours, "times": ratios}
    return {key: [statistics.median(v), min(v), max(v)] for key, v in values.items()}


def peak(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """FLOP/s of the fastest of some matrix products, one of them (m, k) by (k, n)."""
    side = 8192 if device.type == "cuda" else 1024
    rates = []
    for m, k, n in (shape, (side, side, side), (side // 2, side // 2, side // 2)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)
        times = []
        for _ in range(12):
            _wait(device)
            begin = time.perf_counter()
            for _ in range(4):
                torch.nn.functional.linear(a, b)
            _wait(device)
            times.append((time.perf_counter() - begin) / 4)
        rates.append(2.0 * m * k * n / min(times[2:]))
    return max(rates)


def memory(device: torch.device) -> int:
    """Bytes in use at most so far: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _seconds(trainer: Trainer, step: int, world: World) -> float:
    _wait(world.device)
    begin = time.perf_counter()
    trainer.step(step, trainer.run.phase(step), trainer.read(step))
    _wait(world.device)
    return time.perf_counter() - begin


def _parts(trainer: Trainer, step: int, world: World, steps: int) -> dict[str, float]:
    """Median seconds of each of `PARTS`; backward is what the others leave."""
    seconds: dict[str, list[float]] = {name: [] for name in PARTS}
    named = {"data": (trainer, "read"), "forward": (trainer, "objective"),
             "optimizer": (trainer.optimizer, "step"), "ema": (trainer.ema, "update")}  # fmt: skip
    with _timed(named, seconds, world.device):
        for _ in range(steps):
            before = sum(map(sum, seconds.values()))
            whole = _seconds(trainer, step, world)
            seconds["backward"].append(whole - (sum(map(sum, seconds.values())) - before))
    parts = trainer.run.optim.accumulate
    scale = {"forward": parts}  # called once for each micro-batch
    return {name: statistics.median(v) * scale.get(name, 1) for name, v in seconds.items()}


@contextmanager
def _timed(
    named: Mapping[str, tuple[Any, str]], seconds: Mapping[str, list[float]], device: torch.device
) -> Iterator[None]:
    """Within it, each call of those methods (object, name) adds its `seconds`."""

    def timing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            _wait(device)
            begin = time.perf_counter()
            result = call(*args, **options)
            _wait(device)
            seconds[name].append(time.perf_counter() - begin)
            return result

        return timed

    before = {name: getattr(*place) for name, place in named.items()}
    for name, (owner, attribute) in named.items():
        setattr(owner, attribute, timing(name, before[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in named.items():
            setattr(owner, attribute, before[name])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(world: World) -> str:
    if world.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"
