"""Randomness as a function of (seed, step, name), never of history.

A training step asks for its noise, times and coin flips by name. Each number is a function of its
place in the *global* batch (a counter), so a process draws its own rows alone and one process and
eight, a CPU and a GPU see the same numbers, and a resumed run those that it would have seen without
the stop.
"""

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def seeded(seed: int, *tags: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on every tag, in order."""
    text = ":".join(str(part) for part in (seed, *tags))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *tags: int | str) -> torch.Generator:
    """A torch generator on the CPU seeded by `seeded(seed, *tags)`."""
    return torch.Generator().manual_seed(seeded(seed, *tags))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step, for rows `lo:hi` of a global batch. Those of a CPU
    and a GPU agree: uniform ones to the bit, normal ones to rounding."""

    seed: int  # of the run
    step: int  # counted from 0
    lo: int
    hi: int
    device: torch.device | str = "cpu"

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2^-24, shape (hi - lo, *shape), float32."""
        words = self.words(name, math.prod(shape))
        return ((words >> 8).float() * 2.0**-24).view(-1, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal numbers, shape (hi - lo, *shape), float32, by Box and Muller's transform:
        two of two uniform ones."""
        count = math.prod(shape)
        u = (self.words(name, count + count % 2).float() + 0.5) * 2.0**-32  # in (0, 1]
        radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], 2)
        return pairs.flatten(1)[:, :count].reshape(-1, *shape)

    def words(self, name: str, count: int) -> Tensor:
        """`count` words of 32 random bits for each row, int64 (hi - lo, count)."""
        row = torch.arange(self.lo, self.hi, device=self.device)[:, None]
        four = torch.arange(-(-count // 4), device=self.device)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        words = philox((four, row, zero, zero), seeded(self.seed, "draw", name, self.step))
        return torch.stack(words, 2).flatten(1)[:, :count]

    def rows(self, lo: int, hi: int) -> "Draws":
        """The same step, narrowed to rows `lo:hi` of this process's rows (a micro-batch)."""
        return replace(self, lo=self.lo + lo, hi=self.lo + hi)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", 2011): four
    words of 32 bits from four and a key of 64, all in int64 tensors that broadcast."""
    low = 0xFFFFFFFF
    a, b, c, d = counter
    left, right = key & low, key >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64, so all their bits are there
        a, b, c, d = (q >> 32 & low) ^ b ^ left, q & low, (p >> 32 & low) ^ d ^ right, p & low
        left, right = left + 0x9E3779B9 & low, right + 0xBB67AE85 & low
    return a, b, c, d
