"""One contender of `step.py`, in a process of its own: reads orders on stdin, answers on stdout.

An order is a JSON line {"precision", "phase", "steps"}; the answer {"wall": [...], "cpu": [...],
"loss"} has seconds of each step by either clock, CPU time summed over threads. A contender is built
once and keeps its weights over all orders, so that turns can alternate.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import erw
from erw.config import SIZES
from erw.data.cache import Batch
from erw.dist import World
from erw.plan import Phase, repa
from erw.training.benchmark import MadeUp
from erw.training.loop import Trainer
from erw.training.network import resolve
from erw.training.objective import build_objective

Turn = Callable[[str, str], Tensor]
"""(precision, phase) -> the loss of one optimiser step."""

SCALE = 0.18215
CLASSES = 1000


class Given(NamedTuple):
    """The batch that every contender gets: raw moments of the VAE, labels, teacher features."""

    mean: Tensor  # (B, 4, 32, 32)
    std: Tensor
    labels: Tensor
    features: Tensor  # (B, 256, 768)


def given(spec: dict[str, Any], device: torch.device) -> Given:
    """Random numbers of the shapes of ImageNet-256 latents and DINOv2-B features, one per token."""
    rng = torch.Generator().manual_seed(0)
    batch_size, tokens = spec["batch"], (32 // int(spec["model"].split("/")[1])) ** 2
    mean = torch.randn(batch_size, 4, 32, 32, generator=rng) / SCALE
    labels = torch.randint(CLASSES, (batch_size,), generator=rng)
    features = torch.randn(batch_size, tokens, 768, generator=rng)
    parts = (mean, torch.full_like(mean, 0.1), labels, features)
    return Given(*(part.to(device) for part in parts))


def ours(spec: dict[str, Any], device: torch.device) -> Turn:
    """erw's own training step, whole: loader, draws, forward, backward, clip, AdamW, EMA."""
    size, patch = spec["model"].split("/")
    depth, width, heads = SIZES[size]
    sizes = {"depth": depth, "width": width, "heads": heads, "patch": int(patch)}
    run = erw.Run(
        model=erw.config.Model(**sizes, num_classes=CLASSES),
        data=erw.config.Data(batch_size=spec["batch"]),
        plan=erw.Plan(warmup=1, depth=spec["warmup_depth"], align=repa(spec["align_depth"]).align),
        optim=erw.config.Optim(compile=spec["compile"]),
    )
    data = given(spec, device)
    batch = Batch(data.mean * SCALE, data.std * SCALE, data.labels, (data.features,))
    cache: Any = MadeUp(run, {"dinov2-b": 768}, data=batch)
    run = resolve(run, cache)
    world = World(0, 1, device)
    trainer = Trainer(run, cache, world, Path("none"), {}, build_objective(run))
    phases: dict[str, Phase] = {"warmup": run.phase(0), "full": run.phase(1)}
    steps = {"warmup": 0, "full": 1}

    def turn(precision: str, phase: str) -> Tensor:
        trainer.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        trainer.enter(phases[phase])
        step = steps[phase]
        return trainer.step(step, phases[phase], trainer.read(step))["loss"]

    return turn


def answer(turn: Turn, order: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Time the steps of one order, one by one."""
    cuda = device.type == "cuda"
    wall, cpu = [], []
    loss = torch.zeros(())
    for _ in range(order["steps"]):
        if cuda:
            torch.cuda.synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = turn(order["precision"], order["phase"])
        if cuda:
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"wall": wall, "cpu": cpu, "loss": float(loss)}


def main() -> None:
    """Build the contender that argv[1] describes and serve orders until stdin closes."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints to stderr
    torch.set_num_threads(spec["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if spec["name"] == "repa":
        import peer_repa

        turn = peer_repa.repa(spec, given(spec, device), device)
    else:
        turn = ours(spec, device)
    for line in sys.stdin:
        print(json.dumps(answer(turn, json.loads(line), device)), file=answers, flush=True)


if __name__ == "__main__":
    main()
