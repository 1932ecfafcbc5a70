"""Muon against its definition and torch's: what it trains, keeps and costs; learning rates."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from erw import plan as plans
from erw.config import Model, Optim, Run, from_dict
from erw.errors import CheckpointError, ConfigError
from erw.models import BACKBONES, build_model
from erw.recipes import recipe
from erw.training.checkpoint import paths
from erw.training.flops import Ledger, Rate, step_flops
from erw.training.loop import Trainer
from erw.training.network import Network
from erw.training.optimizer import Muon, build_optimizer, orthogonalized
from helpers.tiny import tiny_run
from helpers.training import InterruptAfter, assert_same_run, go, last, logged, trainer, two_ranks

SIT = Model(depth=2, width=32, heads=2, projector=32, input_size=8, channels=4, num_classes=5)


def with_optim(run: Run, **changes: Any) -> Run:
    return run.replace(optim=dataclasses.replace(run.optim, **changes))


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with Muon without a stop, that nothing writes to."""
    out = tmp_path_factory.mktemp("muon") / "run"
    go(with_optim(tiny_run(cache), name="muon"), out)
    return out


def with_plan(run: Run, **changes: Any) -> Run:
    return run.replace(plan=dataclasses.replace(run.plan, **changes))


# -- against the definition
# --------------------------------------------------------------------


def by_definition(g: Tensor) -> Tensor:
    """X <- a X + (b X X' + c (X X')^2) X in float64, by what it does to the singular values."""
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    """And in bf16 it is torch's, whose function is private, to that precision."""
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([by_definition(each) for each in g])
    assert torch.allclose(orthogonalized(g.double(), torch.float64), wanted, atol=1e-12)
    assert torch.allclose(orthogonalized(g).double(), wanted, atol=2e-5)
    half = orthogonalized(g, torch.bfloat16)
    for mine, each in zip(half.float(), g, strict=True):
        theirs = torch.optim._muon._zeropower_via_newtonschulz(
            each, (3.4445, -4.7750, 2.0315), 5, 1e-7
        )
        assert (mine - theirs.float()).norm() < 0.03 * mine.norm()
    near = torch.linalg.svdvals(orthogonalized(g[:, :, :6]))
    assert (near > 0.65).all() and (near < 1.25).all()
    assert not orthogonalized(torch.zeros(1, *shape)).any()


class Layers(nn.Module):
    """A backbone of three Linear layers in `blocks`, and one outside."""

    width = class_token = 0

    def __init__(self) -> None:
        super().__init__()
        shapes = (8, 24), (24, 8), (16, 16)
        self.blocks = nn.ModuleList(nn.Linear(rows, columns) for rows, columns in shapes)
        self.out = nn.Linear(8, 8)


def layers(**changes: Any) -> tuple[Network, Muon]:
    torch.manual_seed(0)
    net = Network(Layers())  # type: ignore[arg-type]
    optim = Optim(name="muon", lr=0.01, precision="fp32", **changes)
    optimizer = build_optimizer(net, optim, torch.zeros(()))
    assert isinstance(optimizer, Muon)
    return net, optimizer


def random_gradients(net: nn.Module) -> None:
    for p in net.parameters():
        p.grad = torch.randn_like(p)


def test_steps_are_those_of_the_definition() -> None:
    """In float64; and the size of a step is that of AdamW's, 0.2 lr."""
    net, optimizer = layers(momentum=0.9, weight_decay=0.1)
    hidden = [block.weight for block in net.model.blocks]  # type: ignore[attr-defined]
    momentum = [torch.zeros_like(p).double() for p in hidden]
    for _ in range(4):
        random_gradients(net)
        before = [p.detach().double() for p in hidden]
        optimizer.step()
        for i, p in enumerate(hidden):
            assert p.grad is not None
            g = p.grad.double()
            momentum[i] = 0.9 * momentum[i] + 0.1 * g
            direction = by_definition(0.1 * g + 0.9 * momentum[i])
            wanted = 0.01 * 0.2 * math.sqrt(max(p.shape)) * direction
            moved = before[i] * (1 - 0.01 * 0.1) - p.detach().double()
            assert (moved - wanted).norm() < 1e-4 * wanted.norm()
            assert moved.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.25)


def stepped(s: Trainer, step: int) -> None:
    if 0 < s.run.plan.warmup == step:
        s.cross_the_boundary()
    s.enter(s.run.phase(step))
    s.step(step, s.run.phase(step), s.read(step))


def test_a_run_is_torchs_muon_and_adamw_by_hand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through both phases: gradients are taken from the run, rates are a cosine of 12 steps.

    torch's momentum, decay and rate of a step, with the iteration in more than its bf16.
    """
    iteration = "_zeropower_via_newtonschulz"
    monkeypatch.setattr(torch.optim._muon, iteration, lambda g, *_: by_definition(g).float())
    run = with_optim(tiny_run(cache), name="muon", weight_decay=0.1, momentum=0.8, eps=1e-6,
                     schedule="cosine", lr_warmup=0)  # fmt: skip
    s, seen = trainer(run, tmp_path), {}
    inner = s.optimizer.step
    s.optimizer.step = lambda: seen.update(gradients(s)) or inner()  # type: ignore[method-assign]
    mine = {k: p.detach().clone() for k, p in s.net.named_parameters()}
    start = {k: p.clone() for k, p in mine.items()}
    hidden = {k for k in mine if any(k.endswith(f"{name}.weight") for name in HIDDEN["gelu"])}
    muon = torch.optim.Muon([mine[k] for k in hidden], momentum=0.8, weight_decay=0.1,
                            adjust_lr_fn="match_rms_adamw")  # fmt: skip
    adamw = torch.optim.AdamW([mine[k] for k in mine.keys() - hidden], eps=1e-6, weight_decay=0.1,
                              betas=run.optim.betas, fused=True)  # fmt: skip
    for step in range(7):
        seen.clear()
        if step == run.plan.warmup and run.plan.optimizer == "fresh":
            muon.state.clear()
            adamw.state.clear()
        stepped(s, step)
        for k, p in mine.items():
            p.grad = seen.get(k)
        for each in (muon, adamw):
            early = run.plan.warmup_lr if step < run.plan.warmup else 1
            each.param_groups[0]["lr"] = run.optim.lr * early * math.cos(math.pi * step / 24) ** 2
            each.step()
    for k, p in s.net.named_parameters():
        assert (p - mine[k]).norm() <= 1e-3 * (p - start[k]).norm(), k


def gradients(s: Trainer) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in s.net.named_parameters() if p.grad is not None}


# -- what it trains
# --------------------------------------------------------------------

HIDDEN = {
    "gelu": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "swiglu": ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"),
    "rdm": ("first", "second"),
}
MODELS = {
    "gelu": SIT,
    "swiglu": dataclasses.replace(SIT, mlp="swiglu", qk_norm=True, class_token="denoised",
                                  class_dim=6),
    "rdm": Model(net="rdm", depth=2, width=32, class_dim=6, num_classes=5),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_the_blocks_matrices_and_nothing_else(kind: str) -> None:
    net = build_model(MODELS[kind])
    optimizer = build_optimizer(Network(net), Optim(name="muon"), torch.zeros(()))
    *hidden, rest = (set(group["params"]) for group in optimizer.param_groups)
    found = set().union(*hidden)
    assert rest == set(net.parameters()) - found
    names = {name for name, p in net.named_parameters() if p in found}
    assert names == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in HIDDEN[kind]}


def test_what_it_cannot_train_is_refused_before_any_work(cache: Path, tmp_path: Path) -> None:
    class Plain(nn.Linear):
        """A backbone without blocks."""

        latent_shape, width, tokens, class_token = (3, 16, 16), 8, 4, 0

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(x)

    BACKBONES["plain"] = lambda model, outputs: Plain(16, 16)
    run = tiny_run(cache, plan=plans.SIT)
    run = run.replace(model=dataclasses.replace(run.model, net="plain"))
    try:
        with pytest.raises(ConfigError, match=r"no Linear layers in .* blocks; take adamw"):
            go(with_optim(run, name="muon"), tmp_path / "run")
    finally:
        del BACKBONES["plain"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"optim.schedule 'cosin'; did you mean cosine"):
        Optim(schedule="cosin")
    with pytest.raises(ConfigError, match=r"'moun'; expected one of 'adamw', 'muon'"):
        from_dict(Optim, {"name": "moun"})


# -- bad steps, stops, processes
# --------------------------------------------------------------------


@pytest.mark.parametrize(("earlier", "value"), [(0, math.nan), (2, math.inf), (2, 1.0)])
def test_a_bad_step_changes_no_bit_of_weights_and_moments(earlier: int, value: float) -> None:
    """The run that meets a bad step goes on as the one that does not."""
    torch.manual_seed(1)
    (net, optimizer), (calm, other) = layers(weight_decay=0.1), layers(weight_decay=0.1)
    for step in range(earlier + 2):
        if step == earlier:
            before = {k: p.clone() for k, p in net.named_parameters()}
            for p in net.parameters():
                p.grad = torch.full_like(p, value)
            optimizer.found_inf.fill_(1)
            optimizer.step()
            assert all(torch.equal(p, before[k]) for k, p in net.named_parameters())
            optimizer.found_inf.fill_(0)
        random_gradients(net)
        for p, q in zip(net.parameters(), calm.parameters(), strict=True):
            q.grad = p.grad
        optimizer.step()
        other.step()
    for p, q in zip(net.parameters(), calm.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, moment in optimizer.state[p].items():
            assert torch.equal(moment, other.state[q][key])


def test_stops_in_both_phases_change_nothing(cache: Path, tmp_path: Path) -> None:
    """With all that shares a step with it; what it keeps is what each optimiser needs."""
    run = with_plan(tiny_run(cache), projector="fresh", optimizer="keep")
    run = with_optim(run, name="muon", accumulate=2, schedule="cosine", ema_profiles=(0.1,))
    go(run, tmp_path / "straight")
    for more in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            go(run, tmp_path / "stopped", progress=InterruptAfter(more))
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    tensors = last(tmp_path / "straight")
    names = [key.removeprefix("net.") for key in tensors if key.startswith("net.")]
    wanted = set()
    for name in names:
        hidden = any(name.endswith(f"{layer}.weight") for layer in HIDDEN["gelu"])
        moments = ("momentum_buffer",) if hidden else ("step", "exp_avg", "exp_avg_sq")
        wanted |= {f"optim.{name}.{moment}" for moment in moments}
    assert {key for key in tensors if key.startswith("optim.")} == wanted


def test_in_warm_up_later_blocks_have_no_momentum_and_keep_their_weights(
    cache: Path, tmp_path: Path
) -> None:
    run = with_plan(with_optim(tiny_run(cache), name="muon"), optimizer="keep", projector="fresh")
    s = trainer(run, tmp_path)
    before = {k: p.clone() for k, p in s.net.named_parameters()}
    for step in range(run.plan.warmup):
        stepped(s, step)
    early, late = s.model.blocks[0].attn.qkv.weight, s.model.blocks[-1].attn.qkv.weight
    assert early in s.optimizer.state and late not in s.optimizer.state
    assert torch.equal(late, before[f"model.blocks.{run.model.depth - 1}.attn.qkv.weight"])
    buffer = s.optimizer.state[early]["momentum_buffer"].clone()
    assert buffer.any()
    s.cross_the_boundary()
    assert torch.equal(s.optimizer.state[early]["momentum_buffer"], buffer)
    assert not any(p in s.optimizer.state for p in s.net.projectors.parameters())
    assert all(torch.equal(s.ema.tensors[k], p) for k, p in s.net.named_parameters())


def test_two_processes_and_micro_batches_are_one_batch(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    go(with_optim(tiny_run(cache), name="muon", accumulate=4), tmp_path / "four")
    how = "--strategy", "hsdp", "--shard-size", 2
    two_ranks(cache, tmp_path / "two", "--loss", "muon", *how)
    one = last(whole)
    for other in (tmp_path / "two", tmp_path / "four"):
        for key, tensor in last(other).items():
            if key.startswith(("net.", "ema.")):
                assert torch.allclose(tensor, one[key], atol=2e-4), key
        for a, b in zip(logged(whole), logged(other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# -- cost
# --------------------------------------------------------------------


def products(shapes: list[tuple[int, int]]) -> int:
    """Five times, n <= m: X X' (2 n n m), its square (2 n n n), their product with X (2 n n m)."""
    pairs = [(min(shape), max(shape)) for shape in shapes]
    return sum(5 * (4 * n * n * m + 2 * n**3) for n, m in pairs)


def test_its_products_are_counted_once_a_step(
    cache: Path, straight: Path, whole: Path, tmp_path: Path
) -> None:
    """In closed form, by torch on the real ones, by hand over the steps, and in metrics.jsonl."""
    run = with_optim(tiny_run(cache), name="muon")
    s = trainer(run, tmp_path)
    w = run.model.width
    block = products([(3 * w, w), (w, w), (4 * w, w), (w, 4 * w)])
    dims = {"efficientnet-lite0": 112}
    phases = (s.run.phase(step) for step in (0, run.plan.warmup))
    warm, full = (step_flops(s.run, dims, phase, own=True) for phase in phases)
    assert (warm, full) == (run.plan.depth * block, run.model.depth * block)
    plain = with_optim(s.run, name="adamw")
    assert step_flops(plain, dims, s.run.phase(0), own=True) == 0

    stepped(s, run.plan.warmup)
    random_gradients(s.net)
    with FlopCounterMode(display=False) as counter:
        s.optimizer.step()
    assert counter.get_total_flops() == full

    for one, other in zip(logged(whole), logged(straight), strict=True):
        early = min(one["step"], run.plan.warmup) * warm
        more = early + max(0, one["step"] - run.plan.warmup) * full
        assert one["flops_total"] - other["flops_total"] == more
        assert one["flops_warmup"] - other["flops_warmup"] == early


def test_the_ledger_pays_it_whatever_the_batch() -> None:
    rates = Rate(0, 2, True, 10, False, 7), Rate(2, 9, False, 100, False, 1000)
    plan = plans.Plan(warmup=2, warmup_batch=8)
    spent = [Ledger(plan, 4, rates, teacher=0, rows=1).spent(step) for step in (1, 2, 3, 12)]
    assert [each.total for each in spent] == [87, 174, 174 + 1400, 174 + 10 * 1400]
    assert [each.warmup for each in spent] == [87, 174, 174, 174]


# -- learning rates
# --------------------------------------------------------------------

CLOSED: dict[str, Callable[[int], float]] = {  # of 10 steps, the last 4 of them wsd's decay
    "constant": lambda step: 1.0,
    "wsd": lambda step: 1.0 if step < 6 else (10 - step) / 4,
    "cosine": lambda step: math.cos(math.pi * step / 20) ** 2,
}


@pytest.mark.parametrize("name", CLOSED)
def test_learning_rates_in_closed_form(cache: Path, tmp_path: Path, name: str) -> None:
    run = with_plan(tiny_run(cache, steps=10), warmup=3, warmup_lr=0.25)
    run = with_optim(run, schedule=name, decay=0.4, lr=0.02, lr_warmup=5)
    s = trainer(run, tmp_path)
    for step in range(10):
        rate = 0.02 * (0.25 if step < 3 else 1) * min(1, (step + 1) / 5) * CLOSED[name](step)
        assert s.lr(step, s.run.phase(step)) == pytest.approx(rate, rel=1e-12)


def test_the_constant_one_has_the_bits_it_always_had(cache: Path, tmp_path: Path) -> None:
    run = with_optim(with_plan(tiny_run(cache), warmup_lr=0.3), lr=0.0123, lr_warmup=7)
    s = trainer(run, tmp_path)
    for step in range(12):
        phase = s.run.phase(step)
        ramp = min(1.0, (step + 1) / 7)
        assert s.lr(step, phase) == run.optim.lr * phase.lr_scale * ramp


def test_a_run_that_ended_goes_on_from_before_its_decay(cache: Path, tmp_path: Path) -> None:
    """wsd of 12 steps falls after the 10th; checkpoints are at 8 and 12."""
    run = with_optim(tiny_run(cache), schedule="wsd", decay=0.25)
    longer, out = run.replace(steps=16), tmp_path / "run"
    go(longer, tmp_path / "straight")
    go(run, out)
    words = r"steps \(12, now 16; optim.schedule wsd lets them change until step 10, not at 12\)"
    with pytest.raises(CheckpointError, match=words):
        go(longer, out)
    paths(out / "checkpoints")[-1].unlink()
    go(longer, out)
    assert_same_run(tmp_path / "straight", out)


def test_muon_recipes_are_their_twins_with_another_optimiser() -> None:
    for name, twin in (
        ("quickstart_muon", "quickstart_repa"),
        ("sit_xl2_in256_muon", "sit_xl2_in256_repa"),
    ):
        run = recipe(name)
        assert run.optim.name == "muon"
        assert with_optim(run, name="adamw").replace(name=twin) == recipe(twin)
