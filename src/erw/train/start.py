"""Weights to begin with other than fresh ones: what fine-tuning starts from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from erw.errors import CheckpointError


@dataclass(frozen=True)
class Init:
    """Parameters of the transformer to begin with, in the run's own convention.

    Attributes:
        source: file or folder they came from. identity: a hash of them.
        said: what was done with them, in words.
        tensors: by parameter name; of a warm-up's file some are absent and start fresh.
        whole: whether every parameter must be among them.
    """

    source: str
    identity: str
    said: str
    tensors: Mapping[str, Tensor]
    whole: bool = True

    def record(self) -> dict[str, str]:
        """What `recipe.json` keeps of it."""
        return {"source": self.source, "identity": self.identity, "said": self.said}


def begin_with(net: nn.Module, init: Init) -> None:
    """Copy the parameters of `init` into the transformer `net`.

    Raises:
        CheckpointError: they are another network's; the first few differences are named.
    """
    want = dict(net.named_parameters())
    wrong = [f"{k} is unexpected" for k in init.tensors if k not in want]
    wrong += [f"{k} is missing" for k in want if init.whole and k not in init.tensors]
    wrong += [
        f"{k} is {tuple(v.shape)} not {tuple(want[k].shape)}"
        for k, v in init.tensors.items()
        if k in want and v.shape != want[k].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{init.source} cannot start this run: {'; '.join(wrong[:4])}"
            f"{'; ...' if len(wrong) > 4 else ''}; leave out the --model settings, or use a cache "
            "with its latent channels"
        )
    with torch.no_grad():
        for name, value in init.tensors.items():
            want[name].copy_(value)
