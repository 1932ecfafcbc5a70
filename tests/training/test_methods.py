"""The methods after ERW, each against its definition written out; what learns from them; exact
resume and two processes of a plan with all of them."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from erw.align import ConvProjector, attention_logits, dispersive
from erw.config import Flow, Model, Run
from erw.errors import ConfigError
from erw.log import read_metrics
from erw.models import SiT
from erw.plan import Align, Phase
from erw.training import FlowMatching
from erw.training.network import Network
from helpers.tiny import tiny_run, with_loss, with_methods
from helpers.training import (
    InterruptAfter,
    assert_close,
    assert_same_run,
    go,
    last,
    logged,
    two_ranks,
)
from training.test_objective import RNG, cosine, hidden, losses, setting


def grads(module: torch.nn.Module) -> set[str]:
    """Names of the parameters with a gradient that is not zero."""
    named = module.named_parameters()
    return {name for name, p in named if p.grad is not None and p.grad.any()}


def test_irepa_is_a_convolution_against_a_target_less_part_of_its_mean() -> None:
    net, batch, phase = setting(Align(block=2, projector="conv", normalize="irepa"))
    z, h = batch.features[0], hidden(net, batch)[2]
    conv, padded = net.projectors[0].conv, F.pad(h.unflatten(1, (4, 4)), (0, 0, 1, 1, 1, 1))
    projected = torch.zeros(4, 4, 4, 24)
    for row in range(3):
        for column in range(3):
            window = padded[:, row : row + 4, column : column + 4]
            projected += window @ conv.weight[:, :, row, column].T
    projected = (projected + conv.bias).flatten(1, 2)
    target = (z - 0.6 * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(losses(net, batch, phase)["align"], cosine(projected, target))


def test_the_convolution_refuses_tokens_that_are_no_grid() -> None:
    with pytest.raises(ConfigError, match="not 15 tokens"):
        ConvProjector(8, 8)(torch.zeros(1, 15, 8))


def internal() -> tuple[Network, SiT]:
    torch.manual_seed(0)
    net = SiT(input_size=8, patch=2, width=32, depth=3, heads=2, num_classes=10, internal=2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return Network(net), net


def test_the_internal_output_learns_the_velocity_after_its_block() -> None:
    network, net = internal()
    _, batch, _ = setting()
    phase = Phase(weights={"flow": 1.0, "internal": 0.5})
    got = losses(network, batch, phase)
    x = batch.mean + batch.std * RNG.normal("latent", 4, 8, 8)
    t, eps = RNG.uniform("time"), RNG.normal("noise", 4, 8, 8)
    y = torch.where(RNG.uniform("label") < 0.1, 10, batch.labels)
    h, c = hidden(network, batch)[2], F.silu(net.t_embedder(t) + net.y_embedder(y))
    shift, scale = net.internal_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
    patches = net.internal_layer.linear(F.layer_norm(h, (32,), eps=1e-6) * (1 + scale) + shift)
    image = F.fold(  # its channels come first, ours last
        patches.unflatten(2, (4, 4)).transpose(2, 3).flatten(2).mT, (8, 8), 2, stride=2
    )
    torch.testing.assert_close(got["internal"], (image - (eps - x)).square().mean())
    assert torch.equal(got["flow"], losses(network, batch, Phase())["flow"])
    got["internal"].backward()
    assert not [name for name in grads(net) if name.startswith(("blocks.2", "final_layer"))]
    assert {"internal_layer.linear.weight", "blocks.0.attn.qkv.weight"} <= grads(net)


def test_the_internal_output_starts_at_zero_and_is_not_warmed_up() -> None:
    net = SiT(input_size=8, width=32, depth=3, heads=2, internal=1)
    tapped = net(torch.randn(2, 4, 8, 8), torch.rand(2), internal=True)
    assert not tapped.internal.any()
    assert net.internal_layer not in net.warmup_modules(2)
    plain = SiT(input_size=8, width=32, depth=3, heads=2)
    assert net.state_dict().keys() - plain.state_dict().keys() == {
        f"internal_layer.{name}" for name in net.internal_layer.state_dict()
    }


def test_sra_aligns_with_the_average_of_the_model_at_an_earlier_time() -> None:
    net, batch, phase = setting(
        Align(block=1, target="ema", target_block=2, earlier=0.2, phase="full")
    )
    teacher = copy.deepcopy(net.model)
    for p in teacher.parameters():
        p.data.mul_(1.1)
    align = losses(net, batch, phase, ema=teacher)["align"]
    x = batch.mean + batch.std * RNG.normal("latent", 4, 8, 8)
    t, eps = RNG.uniform("time"), RNG.normal("noise", 4, 8, 8)
    t = (t - 0.2 * RNG.uniform("earlier align")).clamp(min=0)
    x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * eps
    y = torch.where(RNG.uniform("label") < 0.1, 10, batch.labels)
    target = teacher(x_t, t, y, tap=(2,)).hidden[2]
    torch.testing.assert_close(align, cosine(net.projectors[0](hidden(net, batch)[1]), target))
    align.backward()
    assert not grads(teacher)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_dispersion_is_its_formula_over_all_pairs(temperature: float) -> None:
    z = torch.randn(5, 6, 8, dtype=torch.float64, requires_grad=True)
    pairs = [
        torch.exp(-(z[i] - z[j]).square().sum() / (6 * 8 * temperature))
        for i in range(5)
        for j in range(5)
    ]
    expected = torch.log(torch.stack(pairs).mean())
    expected.backward()
    wanted, z.grad = z.grad, None
    got = dispersive(z, z, temperature=temperature)
    got.backward()
    assert torch.allclose(got.double(), expected, rtol=1e-4)
    assert torch.allclose(z.grad, wanted, rtol=1e-3, atol=1e-6)
    assert dispersive(torch.ones(4, 3, 2), torch.ones(4, 3, 2)).abs() < 1e-6


def test_contrast_is_the_distance_to_the_next_images_velocity() -> None:
    net, batch, _ = setting()
    phase = Run(model=Model(width=32, heads=2), flow=Flow(contrastive=0.05)).phase(0)
    phase = dataclasses.replace(phase, terms=(), weights={**phase.weights, "align": 0.0})
    got = losses(net, batch, phase)
    assert phase.weights["contrastive"] == -0.05
    x = batch.mean + batch.std * RNG.normal("latent", 4, 8, 8)
    t, eps = RNG.uniform("time"), RNG.normal("noise", 4, 8, 8)
    x_t = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * eps
    y = torch.where(RNG.uniform("label") < 0.1, 10, batch.labels)
    v = net.model(x_t, t, y)
    each = [(v[i] - (eps - x)[(i + 1) % 4]).square().mean() for i in range(4)]
    torch.testing.assert_close(got["contrastive"], torch.stack(each).mean())


def test_haste_compares_attention_with_the_teachers() -> None:
    """Two heads of the student with the first two of three of the teacher's."""
    term = Align(
        block=2, target="encoder:vit#attention1", heads=3, projector="none", loss="attention"
    )
    net, batch, phase = setting(term, dim=2 * 24)
    objective = FlowMatching(null_class=10, features=("vit#attention1",))
    got = objective(net, batch, phase, RNG)["align"]
    block = net.model.blocks[1]
    x = hidden(net, batch)[1]
    t = RNG.uniform("time")
    y = torch.where(RNG.uniform("label") < 0.1, 10, batch.labels)
    c = F.silu(net.model.t_embedder(t) + net.model.y_embedder(y))
    shift, scale = block.adaLN_modulation(c)[:, None].chunk(6, -1)[:2]
    q, k, _ = block.attn.qkv(F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift).chunk(3, -1)
    z, entropies = batch.features[0], []
    for head in range(2):
        mine, its = slice(16 * head, 16 * head + 16), slice(8 * head, 8 * head + 8)
        student = (q[..., mine] @ k[..., mine].mT / math.sqrt(16)).softmax(-1)
        teacher = (z[..., :24][..., its] @ z[..., 24:][..., its].mT / math.sqrt(8)).softmax(-1)
        entropies.append(-(teacher * student.log()).sum(-1).mean())
    torch.testing.assert_close(got, torch.stack(entropies).mean())
    got.backward()
    learning = grads(net.model)
    assert "blocks.1.attn.qkv.weight" in learning and "blocks.0.mlp.fc1.weight" in learning
    assert not [name for name in learning if name.startswith(("blocks.2", "blocks.1.mlp"))]


def test_the_tapped_attention_is_what_the_block_uses() -> None:
    torch.manual_seed(0)
    net = SiT(input_size=8, width=32, depth=2, heads=2, rope=True, qk_norm=True, class_token=6)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(2, 4 * 64 + 6), torch.rand(2)
    tapped = net(x, t, tap=(1, 2), attention=(2,))
    block, h = net.blocks[1], tapped.hidden[1]
    y = torch.full((2,), net.null_class)
    c = F.silu(net.t_embedder(t) + net.y_embedder(y))
    shift, scale, gate, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)
    v = block.attn.qkv(block.norm1(h) * (1 + scale) + shift).chunk(3, -1)[2]
    q, k = tapped.attention[2]
    mixed = (q @ k.mT / math.sqrt(16)).softmax(-1) @ v.unflatten(2, (2, 16)).transpose(1, 2)
    h = h + gate * block.attn.proj(mixed.transpose(1, 2).flatten(2))
    h = h + gate2 * block.mlp(block.norm2(h) * (1 + scale2) + shift2)
    torch.testing.assert_close(h, tapped.hidden[2])


def test_heads_that_do_not_divide_the_teachers_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="heads 5: the teacher's attention has 24 channels"):
        attention_logits(torch.zeros(1, 4, 48), 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Align(loss="attention"), "go together"),
        (lambda: Align(target="encoder:dinov2-b#attention9", projector="none"), "go together"),
        (lambda: Align(target="encoder:x#attention9", loss="attention"), "go together"),
        (lambda: Align(earlier=0.2), "earlier is for target ema"),
        (lambda: Model(internal=12), "internal 12 is not below model.depth 12"),
        (lambda: Model(internal=4, class_token="denoised"), "model.internal is for images"),
        (lambda: Flow(contrastive=0.05, prediction="x"), "contrastive compares velocities"),
    ],
)
def test_combinations_without_a_meaning_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_a_plan_of_all_of_them_resumes_exactly(cache: Path, tmp_path: Path) -> None:
    """Warm-up with iREPA's target; then an internal output, contrast, SRA and dispersion, with
    routing until step 10 of 12."""
    run = with_methods(tiny_run(cache))
    go(run, tmp_path / "straight")
    for stop in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            go(run, tmp_path / "stopped", progress=InterruptAfter(stop))
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    lines = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [list(line["losses"]) for line in lines] == [
        ["irepa"],
        *[["flow", "internal", "contrastive", "irepa", "sra", "apart"]] * 2,
    ]


@pytest.mark.parametrize("method", ["haste", "tread"])
def test_neither_a_stop_nor_a_second_process_changes_a_run(
    attended: Path, tmp_path: Path, method: str
) -> None:
    """Stopped within the method's steps, of which the last is the eighth."""
    run = with_loss(tiny_run(attended), method)
    go(run, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(run, tmp_path / "stopped", progress=InterruptAfter(6))
    go(run, tmp_path / "stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    strategy = "fsdp2" if method == "haste" else "ddp"
    two_ranks(attended, tmp_path / "two", "--loss", method, "--strategy", strategy)
    assert_close(last(tmp_path / "straight"), last(tmp_path / "two"))
    for one, two in zip(logged(tmp_path / "straight"), logged(tmp_path / "two"), strict=True):
        assert one["losses"] == pytest.approx(two["losses"], rel=1e-3, abs=1e-5)


def test_two_processes_are_one_with_all_of_them(cache: Path, tmp_path: Path) -> None:
    """The contrast's and the dispersion's other images are those of both processes."""
    go(with_methods(tiny_run(cache)), tmp_path / "one")
    two_ranks(cache, tmp_path / "two", "--methods", "--strategy", "fsdp2")
    assert_close(last(tmp_path / "one"), last(tmp_path / "two"))
