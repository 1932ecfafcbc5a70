"""Weights to begin with other than fresh ones: what fine-tuning starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
        projectors: of the alignment heads, by name; empty: they start fresh.
    """

    source: str
    identity: str
    said: str
    tensors: Mapping[str, Tensor]
    whole: bool = True
    projectors: Mapping[str, Tensor] = field(default_factory=dict)

    def record(self) -> dict[str, str]:
        """What `recipe.json` keeps of it."""
        return {"source": self.source, "identity": self.identity, "said": self.said}


def begin_with(net: nn.Module, init: Init, *, projectors: nn.Module | None = None) -> None:
    """Copy the parameters of `init` into the transformer `net` and the alignment heads.

    Raises:
        CheckpointError: they are another network's; the first few differences are named.
    """
    hint = "leave out the --model settings, or use a cache with its latent channels"
    _copy(init.tensors, net, f"{init.source} cannot start this run", hint, whole=init.whole)
    if init.projectors and projectors is not None:
        said = f"the alignment heads of {init.source} are not those of this run"
        _copy(init.projectors, projectors, said, "leave out --init-projectors", whole=True)


def _copy(
    tensors: Mapping[str, Tensor], into: nn.Module, said: str, hint: str, *, whole: bool
) -> None:
    want = dict(into.named_parameters())
    wrong = [f"{k} is unexpected" for k in tensors if k not in want]
    wrong += [f"{k} is missing" for k in want if whole and k not in tensors]
    wrong += [
        f"{k} is {tuple(v.shape)} not {tuple(want[k].shape)}"
        for k, v in tensors.items()
        if k in want and v.shape != want[k].shape
    ]
    if wrong:
        more = "; ..." if len(wrong) > 4 else ""
        raise CheckpointError(f"{said}: {'; '.join(wrong[:4])}{more}; {hint}")
    with torch.no_grad():
        for name, value in tensors.items():
            want[name].copy_(value)
