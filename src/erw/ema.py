"""Exponential moving average of a module's parameters, all tensors in one call."""

import torch
from torch import Tensor, nn


class Ema:
    """Averages `module`'s parameters in float32: ema <- decay * ema + (1 - decay) * parameter.

    Tensors are kept by name, so that a checkpoint does not depend on the order of modules.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: p.detach().clone().float() for name, p in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present parameters, in one foreach call.

        Parameters that do not train at present are left out: in the warm-up of a large model,
        reading them all would be a good part of a step.
        """
        moving = {n: p.detach().float() for n, p in module.named_parameters() if p.requires_grad}
        averages = [self.tensors[name] for name in moving]
        torch._foreach_lerp_(averages, list(moving.values()), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into `module`."""
        for name, p in module.named_parameters():
            p.copy_(self.tensors[name])
