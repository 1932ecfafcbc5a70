"""Alignment terms, each against its definition written out; entries from outside; exact resume."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erw import ALIGN_LOSSES, PROJECTORS
from erw.data.cache import Batch
from erw.log import read_metrics
from erw.models import SiT
from erw.plan import Align, Phase, Plan, constant, stop_at
from erw.rng import Draws
from erw.training import FlowMatching
from erw.training.network import Network
from erw.training.objective import total
from helpers.tiny import tiny_run
from helpers.training import InterruptAfter, assert_same_run, go

RNG = Draws(0, 3, 0, 4)


def setting(*terms: Align, dim: int = 24) -> tuple[Network, Batch, Phase]:
    """A network of three blocks with all weights away from zero, a batch, and a full phase."""
    torch.manual_seed(0)
    net = SiT(input_size=8, patch=2, width=32, depth=3, heads=2, num_classes=10)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    dims = {term.name: (dim if term.reads_encoder else 32,) for term in terms}
    batch = Batch(
        torch.randn(4, 4, 8, 8), torch.rand(4, 4, 8, 8), torch.tensor([1, 2, 3, 4]),
        (torch.randn(4, 16, dim),) * any(term.reads_encoder for term in terms),
    )  # fmt: skip
    weights = {"flow": 1.0} | {term.name: term.weight(0) for term in terms}
    return (
        Network(net, terms=terms, dims=dims, hidden=16),
        batch,
        Phase(weights=weights, terms=terms),
    )


def losses(net: Network, batch: Batch, phase: Phase, **options: object) -> dict[str, Tensor]:
    objective = FlowMatching(null_class=10, features=("encoder",) * len(batch.features))
    return objective(net, batch, phase, RNG, **options)  # type: ignore[arg-type]


def hidden(net: Network, batch: Batch) -> dict[int, Tensor]:
    """The tokens after each block for the step's noised input, written independently."""
    x = batch.mean + batch.std * RNG.normal("latent", 4, 8, 8)
    t, eps = RNG.uniform("time"), RNG.normal("noise", 4, 8, 8)
    x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * eps
    y = torch.where(RNG.uniform("label") < 0.1, 10, batch.labels)
    return net.model(x_t, t, y, tap=(1, 2, 3)).hidden


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return -F.cosine_similarity(a, b, dim=-1).mean()


def test_two_terms_at_two_blocks_are_weighed_by_name() -> None:
    early = Align(name="early", block=1, weight=constant(2.0))
    late = Align(name="late", block=3, loss="nt_xent", temperature=0.5, weight=constant(0.25))
    net, batch, phase = setting(early, late)
    got, h, z = losses(net, batch, phase), hidden(net, batch), batch.features[0]
    assert list(got) == ["flow", "early", "late"]
    torch.testing.assert_close(got["early"], cosine(net.projectors[0](h[1]), z))
    a, b = F.normalize(net.projectors[1](h[3]), dim=-1), F.normalize(z, dim=-1)
    logits = a @ b.transpose(1, 2) / 0.5
    target = torch.arange(16).expand(4, 16)
    torch.testing.assert_close(got["late"], F.cross_entropy(logits.transpose(1, 2), target))
    weighted = got["flow"] + 2.0 * got["early"] + 0.25 * got["late"]
    torch.testing.assert_close(total(got, phase), weighted)


def test_another_block_is_a_target_without_gradient() -> None:
    """- cos(h_1, stop-gradient h_3): the later block learns nothing from it."""
    term = Align(block=1, target="block", target_block=3, projector="none", phase="full")
    net, batch, phase = setting(term)
    align = losses(net, batch, phase)["align"]
    h = hidden(net, batch)
    torch.testing.assert_close(align, cosine(h[1], h[3]))
    align.backward()
    assert net.model.blocks[0].attn.qkv.weight.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in net.model.blocks[2].parameters())


def test_the_ema_model_is_a_target_without_gradient() -> None:
    term = Align(block=1, target="ema", target_block=2, phase="full")
    net, batch, phase = setting(term)
    teacher = copy.deepcopy(net)
    for p in teacher.parameters():
        p.data.mul_(1.1)
    align = losses(net, batch, phase, ema=teacher.model)["align"]
    expected = cosine(net.projectors[0](hidden(net, batch)[1]), hidden(teacher, batch)[2])
    torch.testing.assert_close(align, expected)
    align.backward()
    assert net.projectors[0][0].weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_loss_on_the_tokens_alone() -> None:
    ALIGN_LOSSES["square"] = lambda projected, target: projected.square().mean()
    term = Align(block=2, target="none", projector="none", loss="square", phase="full")
    try:
        net, batch, phase = setting(term)
        align = losses(net, batch, phase)["align"]
    finally:
        del ALIGN_LOSSES["square"]
    torch.testing.assert_close(align, hidden(net, batch)[2].square().mean())


def test_a_target_can_be_standardised_over_its_tokens() -> None:
    net, batch, phase = setting(Align(block=2, normalize="tokens"))
    z = batch.features[0]
    z = (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)
    align = losses(net, batch, phase)["align"]
    torch.testing.assert_close(align, cosine(net.projectors[0](hidden(net, batch)[2]), z))


def test_a_share_of_the_tokens_is_drawn_for_every_image() -> None:
    """The mean over all subsets is the loss of all tokens; one draw uses so many of each image."""
    net, batch, phase = setting(Align(block=2, tokens=0.25))
    z = batch.features[0].requires_grad_()
    losses(net, batch, phase)["align"].backward()
    used = z.grad.any(-1)
    assert used.sum(1).tolist() == [4, 4, 4, 4]
    assert len({tuple(row.nonzero().flatten().tolist()) for row in used}) > 1


@pytest.fixture
def registered() -> Iterator[None]:
    """A loss and a projector of somebody's own."""
    ALIGN_LOSSES["l2"] = lambda projected, target: (projected - target).square().mean()
    PROJECTORS["wide"] = lambda width, hidden, dim: torch.nn.Linear(width, dim, bias=False)
    yield
    del ALIGN_LOSSES["l2"], PROJECTORS["wide"]


def many_terms() -> Plan:
    """Every kind of target at once, one of them for a few steps only."""
    return Plan(
        warmup=3,
        depth=2,
        align=(
            Align(name="features", block=2, weight=stop_at(1.0, over=4)),
            Align(name="mine", block=3, loss="l2", projector="wide", tokens=0.5, phase="full"),
            Align(name="sync", block=2, target="block", target_block=4, projector="none",
                  weight=constant(0.2), phase="full"),
            Align(name="self", block=2, target="ema", target_block=3, phase="full"),
        ),
    )  # fmt: skip


def test_runs_with_many_terms_log_and_resume_exactly(
    registered: None, cache: Path, tmp_path: Path
) -> None:
    run = tiny_run(cache, plan=many_terms())
    go(run, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(run, tmp_path / "stopped", progress=InterruptAfter(6))
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [list(line["losses"]) for line in lines] == [
        ["features"],  # steps 1 to 3
        ["flow", "features", "mine", "sync", "self"],
        ["flow", "features", "mine", "sync", "self"],
        ["flow", "mine", "sync", "self"],
    ]
    assert lines[-1]["weights"] == {"flow": 1.0, "mine": 0.5, "sync": 0.2, "self": 0.5}
