"""What tests of training share: a run made here or in processes of its own, and what it left."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from erw.config import Run
from erw.data.cache import Cache
from erw.dist import World
from erw.io import tensor_header
from erw.log import Progress, read_metrics
from erw.training import train
from erw.training.checkpoint import paths
from erw.training.loop import Result, Trainer
from erw.training.network import resolve
from erw.training.objective import build_objective

HERE = World(0, 1, torch.device("cpu"))


def go(run: Run, out: Path, **kwargs: Any) -> Result:
    return train(run, out, **{"progress": Progress("", 1, quiet=True), **kwargs})


class InterruptAfter(Progress):
    """Ctrl-C once so many steps are done."""

    def __init__(self, step: int) -> None:
        super().__init__("", 1, quiet=True)
        self.left = step

    def update(self, amount: float = 1) -> None:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)


def program(
    cache: Path, out: Path, *args: object, ranks: int = 0
) -> subprocess.CompletedProcess[str]:
    script = [str(Path(__file__).parent / "tiny.py"), str(cache), str(out), *map(str, args)]
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *script], env=env, capture_output=True, text=True, timeout=300)


def last(out: Path) -> dict[str, torch.Tensor]:
    return load_file(paths(out / "checkpoints")[-1])


def logged(out: Path) -> list[dict[str, Any]]:
    lines = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    assert any(key.startswith("optim.") for key in a)
    weights = [out / "ema.safetensors" for out in (one, other)]
    assert tensor_header(weights[0]) == tensor_header(weights[1])
    for x, y in ((a, b), map(load_file, weights)):
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key
    assert logged(one) == logged(other)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Adam divides by the square root of tiny numbers, so rounding shows; weights must still
    agree."""
    assert a.keys() == b.keys()
    for key in a:
        if key.startswith(("net.", "ema.")):
            assert torch.allclose(a[key], b[key], atol=2e-4), key


def trainer(run: Run, tmp_path: Path) -> Trainer:
    cache = Cache.open(run.data.cache)
    resolved = resolve(run, cache)
    return Trainer(resolved, cache, HERE, tmp_path, {}, build_objective(resolved))
