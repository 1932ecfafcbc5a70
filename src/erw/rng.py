"""Randomness as a function of (seed, step, name), never of history.

A training step asks for its noise, times and coin flips by name. Every rank draws the numbers of
the *global* batch and keeps its own rows, so one process and eight see the same numbers, and a
resumed run sees those that it would have seen without the stop.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def seeded(seed: int, *tags: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on every tag, in order."""
    text = ":".join(str(part) for part in (seed, *tags))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *tags: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `seeded(seed, *tags)`."""
    return torch.Generator(device=device).manual_seed(seeded(seed, *tags))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step, for rows `lo:hi` of a global batch of `total`
    images. CPU and CUDA generators give different numbers."""

    seed: int  # of the run
    step: int  # counted from 0
    lo: int
    hi: int
    total: int
    device: torch.device | str = "cpu"

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal numbers, shape (hi - lo, *shape), float32."""
        return torch.randn(self.total, *shape, **self._options(name))[self.lo : self.hi]

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), shape (hi - lo, *shape), float32."""
        return torch.rand(self.total, *shape, **self._options(name))[self.lo : self.hi]

    def _options(self, name: str) -> dict[str, Any]:
        if str(self.device) == "meta":  # numbers without values, to count FLOPs
            return {"device": "meta"}
        rng = generator(self.seed, "draw", name, self.step, device=self.device)
        return {"generator": rng, "device": self.device}

    def rows(self, lo: int, hi: int) -> "Draws":
        """The same step, narrowed to rows `lo:hi` of this process's rows (a micro-batch)."""
        return replace(self, lo=self.lo + lo, hi=self.lo + hi)
