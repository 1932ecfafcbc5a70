"""The moving average is the formula, tensor by tensor, and leaves alone what does not train."""

import copy

import torch
from torch import nn

from erw.ema import Ema


def test_average_is_the_formula() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema, wanted = Ema(net, decay=0.9), {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update(net)
        for name, p in net.named_parameters():
            wanted[name] = 0.9 * wanted[name] + 0.1 * p.detach()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ema.tensors[name], tensor)
    other = copy.deepcopy(net)
    ema.copy_to(other)
    assert all(torch.equal(p, ema.tensors[name]) for name, p in other.named_parameters())


def test_what_does_not_train_is_left_alone() -> None:
    """As in warm-up: later blocks have not moved, so their average is themselves, bit for bit."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = Ema(net, decay=0.9)
    net[1].requires_grad_(False)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ema.update(net)
    assert not torch.equal(ema.tensors["0.weight"], net[0].weight - 1.0)
    assert torch.equal(ema.tensors["1.weight"], net[1].weight)
