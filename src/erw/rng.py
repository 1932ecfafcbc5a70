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

LOW = 0xFFFFFFFF


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
        return ((words >> 40 & 0xFFFFFF).float() * 2.0**-24).view(-1, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal numbers, shape (hi - lo, *shape), float32: pairs of them by Box and
        Muller's transform of the halves of a word."""
        count = math.prod(shape)
        words = self.words(name, -(-count // 2))
        u, v = (((half & LOW).float() + 0.5) * 2.0**-32 for half in (words, words >> 32))
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], 2)
        return pairs.flatten(1)[:, :count].reshape(-1, *shape)

    def words(self, name: str, count: int) -> Tensor:
        """`count` words of 64 random bits for each row, int64 (hi - lo, count)."""
        place = torch.arange(self.lo * count, self.hi * count, device=self.device)
        tags = "draw", name, self.step
        seed, gamma = seeded(self.seed, *tags), seeded(self.seed, *tags, "gamma")
        return splitmix(place, seed, odd(gamma)).view(-1, count)

    def rows(self, lo: int, hi: int) -> "Draws":
        """The same step, narrowed to rows `lo:hi` of this process's rows (a micro-batch)."""
        return replace(self, lo=self.lo + lo, hi=self.lo + hi)


def splitmix(place: Tensor, seed: int, gamma: int) -> Tensor:
    """SplitMix64's numbers (Steele and others, "Fast splittable pseudorandom number generators",
    2014) at these places from 0 on: 64 bits each, in int64. Streams differ in seed and gamma."""
    x = (place + 1) * signed(gamma) + seed  # modulo 2^64
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def odd(bits: int) -> int:
    """A gamma of SplitMix64: odd, and neither sparse nor regular in its bits."""
    gamma = bits | 1
    return gamma if (gamma ^ gamma >> 1).bit_count() >= 24 else gamma ^ 0xAAAAAAAAAAAAAAAA


def signed(word: int) -> int:
    """64 bits as the number that an int64 has for them."""
    return word - (1 << 64) if word >> 63 else word
