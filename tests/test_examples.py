"""The examples run and learn, and what they say of foreign models holds for each of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from erw.align import Aligned
from erw.errors import ConfigError
from helpers.examples import EXAMPLES, aligned, example, one_of_two, setting
from helpers.forked import both

DIFFUSERS = ["dit_diffusers", "sd3_diffusers", "flux_diffusers"]
ALL = [*DIFFUSERS, "own_loop"]


def blocks(model: nn.Module) -> list[nn.Module]:
    groups = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for group in groups for block in getattr(model, group, ())]


def sample(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sample


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ALL)
def test_example_learns_in_both_phases(name: str) -> None:
    torch.manual_seed(0)
    losses = example(name).train(steps=15, batch_size=8)
    assert [loss.phase for loss in losses] == ["warmup"] * 5 + ["full"] * 10
    assert all(loss.flow == 0 for loss in losses[:5])
    assert losses[4].align < losses[0].align - 0.1
    assert losses[-1].flow < losses[5].flow
    assert losses[-1].align < -0.3


@pytest.mark.parametrize("method", ["irepa", "layersync"])
def test_methods_after_erw_learn_around_diffusers_dit(method: str) -> None:
    torch.manual_seed(0)
    losses = example("dit_diffusers").train(steps=15, batch_size=8, method=method)
    assert {loss.phase for loss in losses} == {"full"}
    assert losses[-1].flow < losses[0].flow
    if method == "irepa":  # LayerSync's two blocks are alike from the start
        assert losses[-1].align < losses[0].align - 0.1


@pytest.mark.parametrize("name", ALL)
def test_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 80


@pytest.mark.parametrize("name", ALL)
def test_warmup_leaves_later_blocks_alone(name: str) -> None:
    model, inputs, z = setting(name)
    net, ran = aligned(name, model), []
    for index, block in enumerate(blocks(model), start=1):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    out, align = net(**inputs, targets=z, stop=True)
    align.backward()
    assert out is None
    assert ran == [1, 2] or ran == [
        1
    ]  # a hook set after ours is not reached: ours leaves the forward
    early, late = blocks(model)[:2], blocks(model)[2:]
    assert late
    assert all(p.grad is None for block in late for p in block.parameters())
    for block in early:
        assert any(p.grad is not None and p.grad.any() for p in block.parameters())
    assert all(p.grad is not None and p.grad.any() for p in net.projectors.parameters())
    ran.clear()
    out, align = net(**inputs, targets=z)
    assert ran == list(range(1, len(blocks(model)) + 1))
    assert sample(out).shape == next(iter(inputs.values())).shape


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_every_sample(name: str, stop: bool) -> None:
    model, inputs, z = setting(name, batch=4)
    key = next(key for key in ("x", "hidden_states") if key in inputs)
    inputs[key].requires_grad_()
    aligned(name, model)(**inputs, targets=z, stop=stop).align.backward()
    size = inputs[key].grad.flatten(1).norm(dim=1)
    assert (size > 0.1 * size.max()).all(), size


@pytest.mark.parametrize("name", ALL)
def test_without_targets_it_is_the_model_itself(name: str) -> None:
    model, inputs, z = setting(name)
    with torch.no_grad():
        before = sample(model(**inputs))
        net = aligned(name, model)
        net(**inputs, targets=z, stop=True)
        out, align = net(**inputs)
        assert align is None
        assert torch.equal(sample(out), before)
        assert torch.equal(sample(net(**inputs, targets=z).out), before)
    assert not any(block._forward_hooks for block in blocks(model))


def gradients(net: Aligned, inputs: dict[str, Any], z: Tensor, *, stop: bool) -> dict[str, Tensor]:
    """Gradients of the whole loss by name, the names of compiled blocks made plain."""
    net.zero_grad(set_to_none=True)
    out, align = net(**inputs, targets=z, stop=stop)
    (align if stop else align + sample(out).square().mean()).backward()
    named = {name.replace("_orig_mod.", ""): p.grad for name, p in net.named_parameters()}
    return {name: grad.clone() for name, grad in named.items() if grad is not None}


def checkpointed(model: nn.Module) -> None:
    model.enable_gradient_checkpointing()


def compiled_in_place(model: nn.Module) -> None:
    for block in blocks(model):
        block.compile(backend="aot_eager")


def compiled_blocks(model: nn.Module) -> None:
    group = model.get_submodule("transformer_blocks")
    for index, block in enumerate(group):
        group[index] = torch.compile(block, backend="eager")


# The compiler looks at .grad of inner tensors and hides the warning, which does not help where
# warnings are errors (torch 2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("change", [checkpointed, compiled_in_place, compiled_blocks])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_checkpointing_and_compiling_change_nothing(
    name: str, change: Callable[[nn.Module], None]
) -> None:
    model, inputs, z = setting(name)
    net = aligned(name, model)
    modes = [True, False, True]  # warm-up, full, and back: no trace of the early stop is left
    plain = [gradients(net, inputs, z, stop=stop) for stop in modes]
    change(model)
    for stop, wanted in zip(modes, plain, strict=True):
        got = gradients(net, inputs, z, stop=stop)
        assert got.keys() >= wanted.keys()
        for key, grad in got.items():  # compiled, an unused half of a block has zeros for None
            torch.testing.assert_close(grad, wanted.get(key, torch.zeros_like(grad)))


def test_reentrant_checkpointing_is_refused() -> None:
    model, inputs, z = setting("dit_diffusers")
    model.enable_gradient_checkpointing(
        lambda run, *args: checkpoint(run, *args, use_reentrant=True)
    )
    inputs["hidden_states"].requires_grad_()
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        aligned("dit_diffusers", model)(**inputs, targets=z, stop=True)


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    model, inputs, z = setting("own_loop", batch=4)
    net = aligned("own_loop", model)
    wanted = [gradients(net, inputs, z, stop=stop) for stop in (True, False)]
    both(one_of_two, str(tmp_path / "meet"), str(tmp_path / "got"))
    for got, one in zip(torch.load(tmp_path / "got"), wanted, strict=True):
        for name, grad in one.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7, msg=name)
        for name in got.keys() - one.keys():
            assert not got[name].any(), name
