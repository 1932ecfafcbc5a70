"""Warm-up and full training: what moves, what is carried over, what is read, which objective."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from erw import ddpm
from erw import plan as plans
from erw.config import Flow
from erw.errors import ConfigError
from erw.rng import Draws
from erw.sampling import generate
from erw.training import load
from erw.training.loop import Trainer
from erw.training.objective import total
from helpers.tiny import as_dit, tiny_run, with_term
from helpers.training import go, trainer


def test_warm_up_trains_early_blocks_embedders_and_projector_alone(
    cache: Path, tmp_path: Path
) -> None:
    run = tiny_run(cache)
    s = trainer(run, tmp_path)
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    for step in range(run.plan.warmup):
        s.enter(s.run.phase(step))
        s.step(step, s.run.phase(step), s.read(step))
    moved = {k for k, p in s.net.named_parameters() if not torch.equal(p, before[k])}
    still = {f"model.blocks.{i}." for i in range(run.plan.depth, run.model.depth)}
    assert not any(k.startswith((*still, "model.final_layer.")) for k in moved)
    assert any(k.startswith("model.blocks.0.attn") for k in moved)
    assert any(k.startswith("model.x_embedder") for k in moved)
    assert any(k.startswith("projectors.0") for k in moved)
    later = [p for k, p in s.net.named_parameters() if k.startswith(tuple(still))]
    assert all(p not in s.optimizer.state for p in later)


@pytest.mark.parametrize("projector", ["keep", "fresh"])
@pytest.mark.parametrize("optimizer", ["keep", "fresh"])
def test_the_boundary_carries_the_weights_exactly(
    cache: Path, tmp_path: Path, projector: str, optimizer: str
) -> None:
    run = tiny_run(cache)
    plan = dataclasses.replace(run.plan, projector=projector, optimizer=optimizer)
    s = trainer(run.replace(plan=plan), tmp_path)
    for step in range(plan.warmup):
        s.enter(s.run.phase(step))
        s.step(step, s.run.phase(step), s.read(step))
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    moments = {k: s.optimizer.state[p]["exp_avg"].clone() for k, p in trained(s)}
    s.cross_the_boundary()
    for k, p in s.net.named_parameters():
        carried = projector == "keep" or not k.startswith("projectors.")
        random = k.endswith("weight") or not k.startswith("projectors.")  # biases start at 0 again
        assert torch.equal(p, before[k]) == carried or not random, k
        assert torch.equal(s.ema.tensors[k], p), k
    kept = {k for k, _ in trained(s)}
    wanted = set() if optimizer == "fresh" else set(moments)
    if projector == "fresh":
        wanted = {k for k in wanted if not k.startswith("projectors.")}
    assert kept == wanted
    for k, p in trained(s):
        assert torch.equal(s.optimizer.state[p]["exp_avg"], moments[k])


def draws_of(s: Trainer, step: int) -> Draws:
    count = s.run.plan.batch(step, s.run.data.batch_size)
    return Draws(s.run.seed, step, 0, count)


def trained(s: Trainer) -> list[tuple[str, nn.Parameter]]:
    return [(k, p) for k, p in s.net.named_parameters() if p in s.optimizer.state]


@pytest.mark.parametrize("dit", [False, True], ids=["flow", "ddpm"])
@pytest.mark.parametrize("clean", ["clean", "noisy"])
def test_the_warm_up_gradient_reaches_every_sample(
    cache: Path, tmp_path: Path, clean: str, dit: bool
) -> None:
    run = as_dit(tiny_run(cache)) if dit else tiny_run(cache)
    run = run.replace(plan=dataclasses.replace(run.plan, warmup_input=clean))
    s = trainer(run, tmp_path)
    phase = run.phase(0)
    for step in range(2):  # adaLN-Zero: the gates must open first
        s.enter(phase)
        s.step(step, phase, s.read(step))
    batch, draws = s.read(2), draws_of(s, 2)
    mean = batch.mean.requires_grad_()
    losses = s.objective(s.net, batch._replace(mean=mean), phase, draws)
    total(losses, phase).backward()
    assert (mean.grad.flatten(1).norm(dim=1) > 0).all()


def test_no_teacher_is_read_once_its_weight_is_zero(cache: Path, tmp_path: Path) -> None:
    run = tiny_run(cache)
    run = with_term(run, weight=plans.stop_at(2.0, over=3))
    s = trainer(run, tmp_path)
    aligned, alone = run.phase(run.plan.warmup + 2), run.phase(run.plan.warmup + 3)
    assert aligned.weights["align"] > 0
    assert len(s.read(6).features) == 1
    assert s.read(7).features == ()
    s.enter(alone)
    losses = s.step(7, alone, s.read(7))
    assert list(losses) == ["loss", "grad_norm", "flow", "bad"]
    assert losses["flow"] == losses["loss"] > 0


@pytest.mark.parametrize("clean", ["clean", "noisy"])
def test_a_dit_is_told_its_step_and_shown_the_latent_there(
    cache: Path, tmp_path: Path, clean: str
) -> None:
    """The step's loss is DiT's (golden in test_diffusion) at what the network was shown."""
    run = as_dit(tiny_run(cache))
    run = run.replace(plan=dataclasses.replace(run.plan, warmup_input=clean))
    s = trainer(run, tmp_path)
    batch, draws, chain, shown = s.read(4), draws_of(s, 4), ddpm.chain(), []
    hook = s.model.register_forward_pre_hook(lambda _, args: shown.append(args))
    warm, full = (s.objective(s.net, batch, run.phase(step), draws) for step in (0, 4))
    hook.remove()
    (early, first, _), (x_s, step, y) = shown
    x = batch.mean + batch.std * draws.normal("latent", *batch.mean.shape[1:])
    eps = draws.normal("noise", *x.shape[1:])
    assert torch.equal(x_s, ddpm.noised(chain, x, eps, step)) and len(set(step.tolist())) > 4
    assert torch.equal(early, x if clean == "clean" else x_s)
    assert torch.equal(first, torch.zeros_like(step) if clean == "clean" else step)
    terms = ddpm.hybrid_terms(chain, s.model(x_s, step, y), x, eps, step)
    assert torch.equal(full["ddpm"], (terms.mse + terms.vb).mean())
    assert list(full) == ["ddpm", "align"] and list(warm) == ["align"]


OBJECTIVES = {
    "score on vp": Flow(prediction="score", path="vp"),
    "velocity on vp": Flow(path="vp", times="logit_normal"),
    "noise on linear": Flow(prediction="noise"),
}


@pytest.mark.parametrize("name", ["DiT", *OBJECTIVES])
def test_every_objective_trains_and_draws(cache: Path, tmp_path: Path, name: str) -> None:
    run = tiny_run(cache)
    run = as_dit(run) if name == "DiT" else run.replace(flow=OBJECTIVES[name])
    go(run, tmp_path / "run")
    model, how = load(tmp_path / "run"), {"steps": 4, "decode": False, "guidance": 2.0}
    assert model.run.flow == run.flow
    for solver in ["ddpm", "ddim"] if name == "DiT" else ["heun", "euler_maruyama", "dopri5"]:
        drawn = generate(model, range(3), solver=solver, **how).collect()
        assert drawn.latents.isfinite().all() and len(drawn.latents) == 3


def test_sit_has_no_projector(cache: Path, tmp_path: Path) -> None:
    s = trainer(tiny_run(cache, plan=plans.SIT), tmp_path)
    assert len(s.net.projectors) == 0
    assert s.run.data.features == ()


def test_a_warm_up_batch_of_another_size_keeps_the_stream_without_gaps(cache: Path) -> None:
    plan = plans.Plan(warmup=3, warmup_batch=16)
    assert [plan.images(i, 8) for i in range(6)] == [0, 16, 32, 48, 56, 64]


def test_a_warm_part_further_back_leaves_the_blocks_before_it_as_they_began(
    cache: Path, tmp_path: Path
) -> None:
    run = tiny_run(cache)
    plan = dataclasses.replace(run.plan, warmup_first=3, depth=3)
    s = trainer(run.replace(plan=plan), tmp_path)
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    for step in range(plan.warmup):
        s.enter(s.run.phase(step))
        s.step(step, s.run.phase(step), s.read(step))
    moved = {k for k, p in s.net.named_parameters() if not torch.equal(p, before[k])}
    blocks = {k.split(".")[2] for k in moved if k.startswith("model.blocks.")}
    assert blocks == {"2"} and any(k.startswith("model.x_embedder") for k in moved)
    # The placement is a shift: what was learned is what the first block alone would have learned.
    first = trainer(run.replace(plan=dataclasses.replace(run.plan, depth=1)), tmp_path)
    of = "model.blocks.{}.".format
    own = {k.replace(of(2), of(0)): p for k, p in s.net.named_parameters() if of(2) in k}
    with torch.no_grad():
        for k, p in first.net.named_parameters():
            p.copy_(before[k.replace(of(0), of(2))])
    for step in range(plan.warmup):
        first.enter(first.run.phase(step))
        first.step(step, first.run.phase(step), first.read(step))
    for k, p in first.net.named_parameters():
        if of(0) in k:
            torch.testing.assert_close(p, own[k])
    s.enter(s.run.phase(plan.warmup))
    assert all(p.requires_grad for p in s.net.parameters())
    with pytest.raises(ConfigError, match=r"warmup_first 3 is behind plan\.depth 2"):
        dataclasses.replace(plan, depth=2)


def test_a_warm_up_without_rotary_positions_is_that_of_a_model_without_them(
    cache: Path, tmp_path: Path
) -> None:
    run = tiny_run(cache)
    with pytest.raises(ConfigError, match=r"warmup_rope false needs a model with model\.rope"):
        run.replace(plan=dataclasses.replace(run.plan, warmup_rope=False))
    rope = dataclasses.replace(run.model, rope=True)
    off = run.replace(model=rope, plan=dataclasses.replace(run.plan, warmup_rope=False))
    losses = []
    for i, one in enumerate((run, off, run.replace(model=rope))):
        s = trainer(one, tmp_path / str(i))
        phases = [s.run.phase(step) for step in (0, 1, run.plan.warmup)]
        for step, phase in enumerate(phases[:2]):
            s.enter(phase)
            losses.append(s.step(step, phase, s.read(step))["loss"])
        with torch.no_grad():
            for p in s.net.parameters():  # open the gates, so that attention is heard
                p.add_(0.02)
            draws = Draws(0, 9, lo=0, hi=8)
            losses += [s.objective(s.net, s.read(9), p, draws)["align"] for p in phases[1:]]
    plain, without, rotated = (torch.stack(losses[4 * i : 4 * i + 4]) for i in range(3))
    assert torch.equal(plain[:3], without[:3]) and not torch.equal(plain[2], rotated[2])
    assert not torch.equal(plain[3], without[3]), "phase 2 has them again"
