"""On a GPU: the step of a CPU, without waiting for the device, resumed to the bit."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erw.config import Run
from erw.data.cache import Cache
from erw.data.loader import Loader, on_device
from erw.dist import World
from erw.errors import NumericsError
from erw.rng import Draws
from erw.training.loop import Trainer
from erw.training.network import resolve
from erw.training.objective import build_objective
from helpers.tiny import tiny_run, with_loss
from helpers.training import InterruptAfter, assert_same_run, go

pytestmark = pytest.mark.gpu


def on(device: str, run: Run, out: Path) -> Trainer:
    cache = Cache.open(run.data.cache)
    resolved, world = resolve(run, cache), World(0, 1, torch.device(device))
    return Trainer(resolved, cache, world, out, {}, build_objective(resolved, cache))


def with_optim(run: Run, **changes: Any) -> Run:
    return run.replace(optim=dataclasses.replace(run.optim, **changes))


def test_draws_are_those_of_a_cpu() -> None:
    here = Draws(3, 5, 2, 7)
    there = dataclasses.replace(here, device="cuda")
    assert torch.equal(there.uniform("a", 1000).cpu(), here.uniform("a", 1000))
    # A sine near 0 is as exact as its angle, which has 24 bits.
    torch.testing.assert_close(
        there.normal("a", 1000).cpu(), here.normal("a", 1000), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", ["cosine", "nt_xent", "muon"])
def test_steps_are_those_of_a_cpu(cache: Path, tmp_path: Path, loss: str, compiled: bool) -> None:
    """Losses, gradient norms and weights over both phases and the boundary."""
    run = with_loss(tiny_run(cache), loss)
    here = on("cpu", run, tmp_path)
    there = on("cuda", with_optim(run, compile=compiled), tmp_path)
    torch.set_float32_matmul_precision("highest")
    there.net.load_state_dict(here.net.state_dict())
    for step in range(8):
        phase, values = run.phase(step), []
        for trainer in (here, there):
            if step == run.plan.warmup:
                trainer.cross_the_boundary()
            trainer.enter(phase)
            values.append(trainer.step(step, phase, trainer.read(step)))
        for name, value in values[0].items():
            torch.testing.assert_close(values[1][name].cpu(), value, rtol=2e-3, atol=2e-4)
    for (name, a), b in zip(here.net.named_parameters(), there.net.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("warmup", [True, False], ids=["warm-up", "full"])
def test_a_step_does_not_wait_for_the_device(cache: Path, tmp_path: Path, warmup: bool) -> None:
    run = with_optim(tiny_run(cache), precision="bf16")
    trainer = on("cuda", run, tmp_path)
    step = 0 if warmup else run.plan.warmup
    phase = run.phase(step)
    trainer.enter(phase)
    for _ in range(2):  # kernels are loaded and moments made
        trainer.step(step, phase, trainer.read(step))
    batch = trainer.read(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(step, phase, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_copied_beside_a_step_are_those_that_were_read(cache: Path) -> None:
    opened = Cache.open(cache)
    loader = Loader(opened, seed=0, features=tuple(opened.features), stored=True)
    read = [loader.batch(range(i, i + 8)).pinned() for i in range(20)]
    busy = torch.randn(2048, 2048, device="cuda")
    for here, there in zip(read, on_device(read, torch.device("cuda")), strict=True):
        busy = busy @ busy / 2048  # what the step would be
        wanted = here.to("cpu")
        assert torch.equal(there.mean.cpu(), wanted.mean)
        assert torch.equal(there.labels.cpu(), wanted.labels)
        assert torch.equal(there.features[0].cpu(), wanted.features[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stop_changes_no_bit(cache: Path, tmp_path: Path, precision: str) -> None:
    run = with_optim(tiny_run(cache), precision=precision)
    go(run, tmp_path / "straight")
    for stop in (3, 4):  # within warm-up, and 7 steps in
        with pytest.raises(KeyboardInterrupt):
            go(run, tmp_path / "parts", progress=InterruptAfter(stop))
    go(run, tmp_path / "parts")
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_what_is_not_finite_stops_before_weights_move(cache: Path, tmp_path: Path) -> None:
    run = tiny_run(cache)
    learn = build_objective(resolve(run, Cache.open(cache)))

    def poisoned(net: Any, batch: Any, phase: Any, rng: Any, **options: Any) -> dict[str, Tensor]:
        losses = learn(net, batch, phase, rng, **options)
        return {k: v * float("nan") for k, v in losses.items()} if rng.step == 9 else losses

    with pytest.raises(NumericsError, match="step 10; "):
        go(run, tmp_path / "run", objective=poisoned)
    go(run, tmp_path / "straight")
    go(run, tmp_path / "run")
    assert_same_run(tmp_path / "straight", tmp_path / "run")
