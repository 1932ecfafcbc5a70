"""The optimisers. They leave parameters without a gradient alone, and while `found_inf` is 1 all
weights and moments, without waiting for the device. A group names the `moments` that checkpoints
have of its parameters."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from erw.config import Optim
from erw.dist import as_sharded, current, precision, whole
from erw.errors import ConfigError
from erw.training.network import Network


def adamw(parameters: Iterable[nn.Parameter], optim: Optim, found_inf: Tensor) -> torch.optim.AdamW:
    """Fused AdamW, which holds still by itself; on the meta device torch's plain one."""
    options = {key: getattr(optim, key) for key in ("lr", "betas", "weight_decay", "eps")}
    group = {"params": list(parameters), "moments": ("step", "exp_avg", "exp_avg_sq")}
    optimizer = torch.optim.AdamW([group], fused=not found_inf.is_meta, **options)
    optimizer.found_inf = None if found_inf.is_meta else found_inf  # type: ignore[attr-defined]
    return optimizer


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan 2024, kellerjordan.github.io/posts/muon) for weights of Linear layers in the
    backbone's `blocks`, fused ones in one; AdamW for all else, layers of the condition included.

    A step moves an n x m matrix by lr 0.2 sqrt(max(n, m)) O, O its Nesterov momentum made nearly
    orthogonal: by 0.2 lr in root mean square, about AdamW's step (arXiv 2502.16982, section 2.2),
    so one `lr` serves both. It is `torch.optim.Muon` with match_rms_adamw, which cannot hold still
    and has bf16 alone, 15 times as slow on CPUs without it."""

    def __init__(self, net: Network, optim: Optim, found_inf: Tensor) -> None:
        self.found_inf, self.processes = found_inf, current()
        self.dtype, _ = precision(optim.precision, found_inf.device)
        modules = nn.ModuleList(getattr(net.model, "blocks", ())).named_modules()
        linear = [(name.split("."), m.weight) for name, m in modules if isinstance(m, nn.Linear)]
        hidden = [p for name, p in linear if not {"adaLN_modulation", "condition"} & {*name}]
        if not hidden:
            raise ConfigError("optim.name muon: no Linear layers in the model's blocks; take adamw")
        options = {key: getattr(optim, key) for key in ("lr", "weight_decay", "momentum")}
        options["moments"] = ("momentum_buffer",)
        shapes = groupby(sorted(hidden, key=lambda p: p.shape), lambda p: p.shape)
        groups, own = [{"params": list(same), **options} for _, same in shapes], set(hidden)
        self.adamw = adamw((p for p in net.parameters() if p not in own), optim, found_inf)
        super().__init__([*groups, *self.adamw.param_groups], {})
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.adamw.step()
        for group in self.param_groups[:-1]:
            if not (weights := [p for p in group["params"] if p.grad is not None]):
                continue
            for p in weights:
                self.state[p] = self.state[p] or {"momentum_buffer": torch.zeros_like(p)}
            buffers = [self.state[p]["momentum_buffer"] for p in weights]
            keep, lr = 1 - self.found_inf, group["lr"] * (1 - self.found_inf)
            # A gradient that is its momentum leaves it as it is, to the bit.
            gradients = [p.grad.where(keep > 0, b) for p, b in zip(weights, buffers, strict=True)]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
            update = torch.stack([whole(u) for u in updates])
            update = self.processes.together(update, lambda g: orthogonalized(g, self.dtype))
            update = update.float() * (0.2 * lr * max(weights[0].shape) ** 0.5)
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            shares = [as_sharded(u, p) for u, p in zip(update, weights, strict=True)]
            torch._foreach_sub_(weights, shares)


def orthogonalized(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices (B, n, m), singular values brought near 1 (0.7 to 1.2 unless they are tiny), by five
    steps of Jordan's Newton-Schulz iteration X <- a X + (b X X' + c (X X')^2) X in `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (g / g.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizer(net: Network, optim: Optim, found_inf: Tensor) -> torch.optim.Optimizer:
    """The optimiser of a run. Raises ConfigError where Muon has nothing to train."""
    muon = optim.name == "muon"
    return Muon(net, optim, found_inf) if muon else adamw(net.parameters(), optim, found_inf)
