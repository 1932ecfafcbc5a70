"""What tests of training share: a run made here or in processes of its own, and what it left."""

import signal
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
from erw.training.checkpoint import paths, read
from erw.training.loop import Result, Trainer
from erw.training.network import resolve
from erw.training.objective import build_objective
from helpers.forked import Python, ranks

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


def program(cache: Path, out: Path, *args: object) -> Python:
    """A run in a process of its own, which has ended."""
    done = Python(Path(__file__).parent / "tiny.py", cache, out, *args)
    done.wait()
    return done


def two_ranks(
    cache: Path, out: Path, *args: object, torchrun: bool = False, codes: list[int] | None = None
) -> list[Python]:
    """A run by two processes, under torchrun or told what it would tell them, which ends with these
    exit codes."""
    script = [Path(__file__).parent / "tiny.py", cache, out, *args]
    if torchrun:
        launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = Python("-m", *launch, *script, env={"OMP_NUM_THREADS": "1"})
        assert done.wait() == 0, done.err
        return []
    both = [Python(*script, env=env) for env in ranks(2)]
    assert [rank.wait() for rank in both] == (codes or [0, 0]), [rank.err for rank in both]
    return both


def last(out: Path) -> dict[str, torch.Tensor]:
    return read(paths(out / "checkpoints")[-1])[0]


def logged(out: Path) -> list[dict[str, Any]]:
    lines = read_metrics(out / "metrics.jsonl")
    clocks = "seconds", "eval_seconds"
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


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
