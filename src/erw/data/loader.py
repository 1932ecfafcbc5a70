"""Batches as a function of (seed, position): an endless stream, shuffled anew each epoch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..draws import seeded
from ..errors import DataError
from .cache import Batch, Cache

T = TypeVar("T")
Words = NDArray[np.uint64]
_ROUNDS = 8


class Loader:
    """Reads rows of a cache in a random order that only `seed` decides.

    Position p of the stream is row `permutation(p mod n)` of epoch `p div n`, n rows a cache.
    Nothing is materialised: memory does not depend on n. `features` names encoders in the cache,
    `token` one of them whose class token is read too;
    `flip` (default: if the cache holds mirrored rows) mirrors every other image, by chance.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int,
        features: Sequence[str] = (),
        token: str = "",
        flip: bool | None = None,
    ) -> None:
        self.flip = cache.variants > 1 if flip is None else flip
        cache.require(encoders=features, token=token, flip=self.flip)
        self.cache, self.seed, self.features, self.token = cache, seed, tuple(features), token

    def batch(self, start: int, count: int, *, lo: int = 0, hi: int | None = None) -> Batch:
        """Rows `lo:hi` of the batch of `count` images that starts at position `start`.

        The same whoever asks and whatever was asked before: ranks take slices of one batch.
        """
        hi = count if hi is None else hi
        if start < 0 or not 0 <= lo <= hi <= count:
            raise DataError(f"rows {lo}:{hi} of a batch of {count} at {start} do not exist")
        positions = np.arange(start + lo, start + hi, dtype=np.int64)
        flipped = self.flipped(positions) if self.flip else None
        return self.cache.read(
            self.rows(positions), features=self.features, token=self.token, flipped=flipped
        )

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Row of the cache at each position of the stream, int64."""
        number = len(self.cache)
        epochs, places = np.divmod(positions, number)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = seeded(self.seed, "epoch", int(epoch))
            rows[here] = permuted(places[here], number, key=key)
        return rows

    def flipped(self, positions: np.ndarray) -> np.ndarray:
        """A fair coin for each position of the stream, bool."""
        key = np.uint64(seeded(self.seed, "flip"))
        return (_mix(positions.astype(np.uint64) ^ key) >> np.uint64(63)).astype(bool)


def permuted(places: np.ndarray, number: int, *, key: int) -> np.ndarray:
    """Where a random permutation of 0..number-1, chosen by `key`, sends each place; int64.

    A Feistel network over pairs (left, right) of mixed radix a * b >= number (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002); results beyond the end walk on until inside.
    """
    if number < 1 or (len(places) and not 0 <= places.min() <= places.max() < number):
        raise DataError(f"places outside 0..{number - 1} of a permutation")
    a = np.uint64(int(np.ceil(np.sqrt(number))))
    b = np.uint64(-(-number // int(a)))
    keys = [np.uint64(seeded(key, "round", turn)) for turn in range(_ROUNDS)]
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], a, b, keys)
        outside = outside[values[outside] >= number]
    return values.astype(np.int64)


def _feistel(values: Words, a: np.uint64, b: np.uint64, keys: list[np.uint64]) -> Words:
    """One pass: each turn shifts one half by a hash of the other, which can be undone."""
    left, right = values // b, values % b
    for turn, key in enumerate(keys):
        if turn % 2:
            right = (right + _mix(left ^ key) % b) % b
        else:
            left = (left + _mix(right ^ key) % a) % a
    return left * b + right


def _mix(values: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): all output bits need all input bits."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def prefetch(fetch: Callable[[int], T], steps: range, *, depth: int = 2) -> Iterator[T]:
    """`fetch(step)` for each step in order, up to `depth` of them made ahead by one thread.

    Results are those of calling `fetch` directly: it must be a function of its argument.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending: list[Future[T]] = []
        ahead = iter(steps)
        try:
            for step in ahead:
                pending.append(pool.submit(fetch, step))
                if len(pending) > depth:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
