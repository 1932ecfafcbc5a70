"""Training with token routing: what is aligned and paid; stops, ranks and micro-batches change
nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erw.config import Model, Run
from erw.data.cache import Batch
from erw.models import SiT
from erw.plan import SIT, Align, Phase, Plan, Routing, constant
from erw.rng import Draws
from erw.routing import Route, choose
from erw.training import FlowMatching
from erw.training.flops import step_flops
from erw.training.network import Network
from helpers.tiny import tiny_run, with_loss
from helpers.training import InterruptAfter, assert_same_run, go, last, logged, two_ranks

RNG = Draws(0, 2, 0, 4)
TREAD = Routing("tread", (2, 3), 0.375)
SPRINT = Routing("sprint", (2, 3), 0.25, "grid", path_drop=0.5)

# -- the objective --------------------------------------------------------------------------------


def setting(term: Align, routing: Routing, **options: Any) -> tuple[Network, Batch, Phase]:
    """A network of four blocks with all weights away from zero, a batch, and a routed phase."""
    torch.manual_seed(0)
    fusion = routing.blocks if routing.kind == "sprint" else ()
    net = SiT(
        input_size=8, patch=2, width=32, depth=4, heads=2, num_classes=10, fusion=fusion, **options
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    dim = 24
    batch = Batch(
        torch.randn(4, 4, 8, 8), torch.rand(4, 4, 8, 8), torch.tensor([1, 2, 3, 4]),
        (torch.randn(4, 16, dim),), torch.randn(4, dim) if net.class_token else None,
    )  # fmt: skip
    plan = Plan(align=(term,), routing=routing)
    phase = plan(0)
    if net.class_token:
        phase = dataclasses.replace(phase, weights={**phase.weights, "token": 0.03})
    dims = {term.name: (dim if term.reads_encoder else 32,)}
    return Network(net, terms=(term,), dims=dims, hidden=16), batch, phase


def losses(net: Network, batch: Batch, phase: Phase, **options: Any) -> dict[str, Tensor]:
    token = "denoised" if net.model.class_token else "none"
    objective = FlowMatching(10, ("encoder",), patches=16, token=token)
    return objective(net, batch, phase, RNG, **options)


def drawn(routing: Routing, phase: Phase) -> Route:
    """The step's route, written independently of the objective."""
    u = RNG.uniform("routing", 16)
    kept = choose(u, routing.keep, routing.choose)
    dropped: Any = False
    if routing.kind == "sprint":
        dropped = RNG.uniform("path") < routing.path_drop
        assert dropped.any() and not dropped.all()
    return Route(routing.blocks, kept, dropped)


def noised(net: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    x = batch.mean + batch.std * RNG.normal("latent", 4, 8, 8)
    if net.model.class_token:
        x = torch.cat([x.flatten(1), batch.token], 1)
    t, eps = RNG.uniform("time"), RNG.normal("noise", *x.shape[1:])
    at = t.view(-1, *[1] * (x.dim() - 1))
    return (1 - at) * x + at * eps, t, torch.where(RNG.uniform("label") < 0.1, 10, batch.labels)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return -F.cosine_similarity(a, b, dim=-1).mean()


@pytest.mark.parametrize("routing", [TREAD, SPRINT], ids=["tread", "sprint"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"class_token": 24, "rope": True}], ids=["plain", "reg"])
def test_what_is_aligned_are_the_patches_that_are_there(
    routing: Routing, block: int, options: dict[str, Any]
) -> None:
    """Within the routed blocks the kept ones, with their features (and the class token with its
    own); before and after them all."""
    net, batch, phase = setting(Align(block=block, weight=constant(2.0)), routing, **options)
    got = losses(net, batch, phase)
    route = drawn(routing, phase)
    tapped = net.model(*noised(net, batch), tap=(block,), route=route)
    values = []
    for i, h in enumerate(tapped.hidden[block]):
        z = batch.features[0][i]
        z = z[route.kept[i]] if block in (2, 3) else z
        if batch.token is not None:
            z = torch.cat([batch.token[i : i + 1], z])
        values.append(cosine(net.projectors[0](h), z))
    torch.testing.assert_close(got["align"], torch.stack(values).mean())
    assert got.keys() == phase.weights.keys()


@pytest.mark.parametrize(
    ("block", "target", "target_block"),
    [(3, "block", 4), (1, "block", 2), (2, "block", 3), (1, "block", 4), (3, "ema", 3)],
)
def test_two_blocks_are_compared_at_patches_that_both_have(
    block: int, target: str, target_block: int
) -> None:
    """A block is compared at what the routed one has, the EMA model's, which sees all, too."""
    term = Align(
        block=block, target=target, target_block=target_block, projector="none", phase="full"
    )
    net, batch, phase = setting(term, TREAD)
    got = losses(net, batch, phase, ema=net.model)["align"]
    route, x = drawn(TREAD, phase), noised(net, batch)
    hidden = net.model(*x, tap=(1, 2, 3, 4), route=route).hidden
    other = net.model(*x, tap=(target_block,)).hidden if target == "ema" else hidden

    def at(h: Tensor, i: int) -> Tensor:
        few = {block, target_block} & {2, 3}
        return h[i][route.kept[i]] if few and len(h[i]) == 16 else h[i]

    pairs = [(at(hidden[block], i), at(other[target_block], i)) for i in range(4)]
    expected = torch.stack([cosine(a, b) for a, b in pairs]).mean()
    torch.testing.assert_close(got, expected)


def test_without_routing_nothing_is_drawn_or_passed() -> None:
    net, batch, phase = setting(Align(block=2), TREAD)
    dense = dataclasses.replace(phase, routing=None)
    seen: list[dict[str, Any]] = []
    net.model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw), with_kwargs=True)
    losses(net, batch, dense)
    losses(net, batch, phase)
    assert "route" not in seen[0] and "route" in seen[1]


# -- cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tread", "sprint"])
def test_a_routed_step_saves_the_closed_form(kind: str) -> None:
    """Of T patches K run through n blocks of width D. A token costs 24 D^2 in a block, a pair of
    them 4 D, the fusion of a token 4 D^2; forward and backward are three times that."""
    d, n, t, k = 32, 2, 16, {"tread": 6, "sprint": 4}[kind]
    model = Model(
        depth=4, width=d, heads=2, input_size=8, channels=4, num_classes=10,
        fusion=(2, 3) if kind == "sprint" else (),
    )  # fmt: skip
    routing = {"tread": TREAD, "sprint": SPRINT}[kind]
    until = dataclasses.replace(routing, until=5)
    run = Run(model=model, plan=Plan(align=(), routing=until), steps=10)
    routed, tail = (step_flops(run, {}, run.phase(step)) for step in (4, 5))
    assert tail - routed == 3 * n * (24 * d * d * (t - k) + 4 * d * (t * t - k * k))
    plain = run.replace(model=dataclasses.replace(model, fusion=()), plan=SIT)
    fusion = 3 * t * 4 * d * d if kind == "sprint" else 0
    assert tail - step_flops(plain, {}, plain.phase(0)) == fusion
    assert run.plan.segments(10) == ((0, 5), (5, 10))


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """SPRINT: four steps of warm-up, four routed and four dense ones."""
    run, out = with_loss(tiny_run(cache), "sprint"), tmp_path_factory.mktemp("routed") / "run"
    go(run, out)
    return run, out


def test_a_stop_changes_nothing(routed: tuple[Run, Path], tmp_path: Path) -> None:
    """Within the routed steps, and at their end."""
    run, straight = routed
    for steps in (6, 2):
        with pytest.raises(KeyboardInterrupt):
            go(run, tmp_path / "run", progress=InterruptAfter(steps))
    go(run, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


def test_the_log_counts_routed_steps_as_they_are(routed: tuple[Run, Path]) -> None:
    """Four of each kind: the dense ones at the end cost more."""
    _, straight = routed
    spent = [line["flops_total"] - line["flops_teacher"] for line in logged(straight)]
    assert spent[1] - spent[0] < spent[2] - spent[1]


def test_micro_batches_are_the_batch_and_two_processes_are_one(
    routed: tuple[Run, Path], cache: Path, tmp_path: Path
) -> None:
    run, straight = routed
    go(run.replace(optim=dataclasses.replace(run.optim, accumulate=4)), tmp_path / "four")
    two_ranks(cache, tmp_path / "two", "--loss", "sprint")
    one = last(straight)
    for other in (last(tmp_path / "four"), last(tmp_path / "two")):
        assert one.keys() == other.keys()
        for key in one:
            if key.startswith(("net.", "ema.")):
                assert torch.allclose(one[key], other[key], atol=2e-4), key
    for a, b in zip(logged(straight), logged(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
