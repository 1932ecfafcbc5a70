"""Guidance: its formula, its interval, and what it costs."""

import torch
from torch import Tensor

from erw.sampling.guidance import classifier_free, conditional, guided


def test_guidance_is_its_formula_and_costs_double_inside_only() -> None:
    sizes = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        assert t.shape == y.shape == (len(x),)
        return x * y[:, None] + t[:, None]

    x, y = torch.randn(4, 3), torch.tensor([1, 2, 3, 4])
    velocity = classifier_free(model, y, 9, scale=1.7, interval=(0.2, 0.6))
    plain = conditional(model, y)
    for t in (0.2, 0.4, 0.6, 0.6 + 1e-12):
        expected = (x * 9 + t) + 1.7 * (x * y[:, None] - x * 9)
        assert torch.allclose(velocity(x, t), expected, atol=1e-5)
    assert sizes == [8] * 4
    for t in (0.19, 0.61):
        assert torch.equal(velocity(x, t), plain(x, t))
    assert torch.equal(classifier_free(model, y, 9, scale=1.0)(x, 0.5), plain(x, 0.5))
    assert sizes[4:] == [4] * 6


def test_guidance_by_any_other_velocity() -> None:
    calls = []

    def other(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return 2 * x

    x = torch.randn(4, 5, 2, 2)
    velocity = guided(lambda x, t: x + t, other, scale=3.0, interval=(0.2, 0.6))
    assert torch.allclose(velocity(x, 0.4), 2 * x + 3 * (x + 0.4 - 2 * x))
    assert torch.equal(velocity(x, 0.7), x + 0.7) and calls == [0.4]
    some = guided(lambda x, t: x + t, other, scale=3.0, channels=3)(x, 0.4)
    assert torch.equal(some[:, :3], velocity(x, 0.4)[:, :3])
    assert torch.equal(some[:, 3:], (x + 0.4)[:, 3:])
