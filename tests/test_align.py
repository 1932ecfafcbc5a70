"""Alignment losses and `Aligned`: the peer's values, closed forms, and gradients for every
sample."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from erw import flow
from erw.align import Aligned, Projector, cosine, nt_xent
from erw.errors import ConfigError
from erw.models import SiT
from helpers.reference import Golden, fill, relative, tensors

TINY = dict(input_size=8, patch=2, width=64, depth=4, heads=4, num_classes=1000)


def golden_net() -> Aligned:
    net = Aligned(SiT(**TINY), at="blocks.1", width=64, dim=32, hidden=48)
    fill(net, prefix="model.")
    return net


def test_projected_tokens_of_repa(golden: Golden) -> None:
    data, meta = tensors(golden("sit_forward"))
    net = golden_net()
    tokens = net.model(data["x"], data["t"], data["y"], tap=(meta["encoder_depth"],)).hidden[2]
    assert relative(net.projectors[0](tokens), data["z_tilde"]) < 1e-5


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_losses_and_gradients_of_repa(golden: Golden, name: str) -> None:
    data, meta = tensors(golden(f"repa_loss_{name}"))
    net = golden_net()
    t = data["t"].reshape(-1)
    noised = flow.noise(data["x"], data["noise"], t, path=flow.PATHS[meta["path"]])
    out, align = net(noised.x_t, t, data["y"], targets=data["z"])
    per_image = (out - noised.velocity).pow(2).mean((1, 2, 3))
    assert relative(per_image, data["denoising"]) < 1e-5
    assert relative(align, data["projection"]) < 1e-5
    (per_image.mean() + meta["proj_coeff"] * align).backward()
    ours = {k.removeprefix("model."): p.grad.norm() for k, p in net.named_parameters()}
    theirs = meta["grad_norm"]
    assert ours.keys() == theirs.keys() - {"pos_embed"}
    for key, norm in ours.items():
        assert float(norm) == pytest.approx(theirs[key], rel=1e-4), key


def test_cosine_is_minus_one_for_parallel_and_one_for_opposite_tokens() -> None:
    z = torch.randn(3, 5, 8)
    assert cosine(2.5 * z, z).item() == pytest.approx(-1, abs=1e-6)
    assert cosine(-z, 3 * z).item() == pytest.approx(1, abs=1e-6)


def test_losses_are_float32_under_autocast() -> None:
    z = torch.randn(2, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (cosine, nt_xent):
            assert loss(z.bfloat16(), z).dtype == torch.float32


@pytest.mark.parametrize("negatives,others", [("image", 6), ("batch", 4 * 6), ("pooled", 4)])
def test_nt_xent_of_features_that_say_nothing_is_the_log_of_the_choices(
    negatives: str, others: int
) -> None:
    ones = torch.ones(4, 6, 8)
    loss = nt_xent(ones, ones, negatives=negatives)
    assert loss.item() == pytest.approx(torch.tensor(float(others)).log().item(), rel=1e-5)


@pytest.mark.parametrize("negatives", ["image", "batch", "pooled"])
def test_nt_xent_is_its_definition(negatives: str) -> None:
    a, b, tau = torch.randn(3, 4, 8), torch.randn(3, 4, 8), 0.3
    if negatives == "pooled":
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    terms = []
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            keys = b[i] if negatives == "image" else b.flatten(0, 1)
            top = (a[i, j] @ b[i, j] / tau).exp()
            terms.append(-(top / (keys @ a[i, j] / tau).exp().sum()).log())
    args = {"temperature": tau, "negatives": negatives}
    assert torch.allclose(nt_xent(a, b, **args), torch.stack(terms).mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", [cosine, nt_xent, partial(nt_xent, negatives="batch")])
def test_the_gradient_reaches_every_sample(loss: Callable[..., Any]) -> None:
    """The released warm-up loss trained on the last image of each batch alone."""
    tokens = torch.randn(4, 6, 8, requires_grad=True)
    loss(tokens, torch.randn(4, 6, 8)).backward()
    assert (tokens.grad.flatten(1).norm(dim=1) > 0).all()


def test_several_encoders_are_averaged() -> None:
    net = Aligned(nn.Identity(), at="", width=16, dim=(8, 24), hidden=12)
    tokens, z = torch.randn(2, 5, 16), (torch.randn(2, 5, 8), torch.randn(2, 5, 24))
    each = [cosine(p(tokens), t) for p, t in zip(net.projectors, z, strict=True)]
    assert torch.allclose(net(tokens, targets=z).align, sum(each) / 2)


def foreign() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16), nn.Linear(16, 6))


def test_a_foreign_model_is_tapped_and_stopped_untouched() -> None:
    model = foreign()
    net = Aligned(model, at="1", width=16, dim=8, hidden=12)
    x, z = torch.randn(2, 5, 6), torch.randn(2, 5, 8)
    assert torch.equal(net(x).out, model(x))
    full, stopped = net(x, targets=z), net(x, targets=z, stop=True)
    assert torch.equal(full.out, model(x))
    assert stopped.out is None
    assert torch.equal(stopped.align, full.align)
    stopped.align.backward()
    assert model[0].weight.grad is not None
    assert model[2].weight.grad is None and model[3].weight.grad is None
    assert not model[1]._forward_hooks


def test_features_of_another_shape_are_refused() -> None:
    net = Aligned(foreign(), at="1", width=16, dim=8, hidden=12)
    with pytest.raises(ConfigError, match="expected the same shape"):
        net(torch.randn(2, 5, 6), targets=torch.randn(2, 3, 8))


def test_the_projector_is_the_released_mlp() -> None:
    keys = {name: tuple(p.shape) for name, p in Projector(4, 5, 6).named_parameters()}
    assert keys == {
        "0.weight": (5, 4), "0.bias": (5,), "2.weight": (5, 5), "2.bias": (5,),
        "4.weight": (6, 5), "4.bias": (6,),
    }  # fmt: skip
