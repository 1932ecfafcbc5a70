"""Batches as a function of (seed, position): an endless stream, shuffled anew each epoch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from erw.data.cache import Batch, Cache
from erw.rng import seeded

T = TypeVar("T")


class Loader:
    """Reads rows of a cache in a random order that only `seed` decides.

    Position p of the stream is row `permutation[p mod n]` of epoch `p div n`, for n rows.

    Args:
        features: names of encoders in the cache.
        token: one of them whose class token is read too.
        flip: mirror every other image, by chance; None: if the cache has mirrored rows.
        stored: leave features packed until `Batch.to` (see `Cache.read`).
    """

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int,
        features: Sequence[str] = (),
        token: str = "",
        flip: bool | None = None,
        stored: bool = False,
    ) -> None:
        self.flip = cache.variants > 1 if flip is None else flip
        cache.require(encoders=features, token=token, flip=self.flip)
        self.cache, self.seed, self.stored = cache, seed, stored
        self.features, self.token = tuple(features), token
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, start: int, count: int, *, lo: int = 0, hi: int | None = None) -> Batch:
        """Rows `lo:hi` of the batch of `count` images that starts at position `start`.

        Independent of earlier calls and of who calls: ranks read slices of one batch.
        """
        positions = np.arange(start + lo, start + (count if hi is None else hi), dtype=np.int64)
        return self.cache.read(
            self.rows(positions),
            features=self.features,
            token=self.token,
            flipped=self.flipped(positions) if self.flip else None,
            packed=self.stored,
        )

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Row of the cache at each position of the stream, int64."""
        return self._drawn(positions, 0)

    def flipped(self, positions: np.ndarray) -> np.ndarray:
        """A fair coin for each position of the stream, bool."""
        return self._drawn(positions, 1).astype(bool)

    def _drawn(self, positions: np.ndarray, part: int) -> np.ndarray:
        epochs, places = np.divmod(positions, len(self.cache))
        values = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            values[here] = self._epoch(int(epoch))[part][places[here]]
        return values

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and coins of an epoch: 10 ms for a million rows."""
        draw = np.random.Generator(np.random.Philox(seeded(self.seed, "epoch", epoch)))
        number = len(self.cache)
        return draw.permutation(number), draw.random(number) < 0.5


def prefetch(
    fetch: Callable[[int], T], steps: Iterable[int], *, depth: int = 2, threads: int = 1
) -> Iterator[T]:
    """`fetch(step)` for each step in order, up to `depth` of them ahead in so many threads."""
    pending: list[Future[T]] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        try:
            for step in steps:
                pending.append(pool.submit(fetch, step))
                if len(pending) > depth:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
