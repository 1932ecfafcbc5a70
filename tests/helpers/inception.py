"""Random weights for the 2015 Inception network, in the file format of pytorch-fid."""

import torch
from torch import Tensor

from erw.evaluation.inception import POOL, Inception


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights by name: He's scale, batch norms off the identity."""
    rng = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, value in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.startswith("fc."):
            state[name] = 0.1 * torch.randn(value.shape, generator=rng)
        elif name.endswith(".conv.weight"):
            scale = (2 / value[0].numel()) ** 0.5
            state[name] = scale * torch.randn(value.shape, generator=rng)
        else:
            middle = float(name.endswith((".bn.weight", ".running_var")))
            noise = torch.rand(value.shape, generator=rng) * 2 - 1
            state[name] = middle + 0.1 * noise
    return state


def pool_and_spatial(net: Inception, images: Tensor) -> tuple[Tensor, Tensor]:
    """`pool_3` (B, 2048) and the spatial features (B, 2023)."""
    features = net.pooled(images)
    return features[:, :POOL], features[:, POOL:]
