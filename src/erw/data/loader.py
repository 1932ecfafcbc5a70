"""Batches as a function of (seed, position): an endless stream, shuffled anew each epoch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from erw.data.cache import Cache
from erw.errors import DataError
from erw.rng import seeded

T = TypeVar("T")
Words = NDArray[np.uint64]
_ROUNDS = 8
_FIRST = 4096  # rows whose shards are fetched first


class Loader:
    """Reads rows of a cache in a random order that only `seed` decides.

    Position p of the stream is row `permutation(p mod n)` of epoch `p div n`, n rows a cache.
    Nothing is materialised: memory does not depend on n. `features` names encoders in the cache,
    `token` one of them whose class token is read too;
    `flip` (default: if the cache holds mirrored rows) mirrors every other image, by chance.

    With a `window` of shards the permutation is of fewer: shards come in a random order, and rows
    are mixed within groups of so many. For caches that lie far away and do not fit on this disk.
    `stored` leaves features packed, for another device to unpack: that moves a half or a quarter.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        seed: int,
        features: Sequence[str] = (),
        token: str = "",
        flip: bool | None = None,
        window: int = 0,
        stored: bool = False,
    ) -> None:
        self.flip = cache.variants > 1 if flip is None else flip
        cache.require(flip=self.flip)
        self._columns = cache.columns(features=features, token=token)
        cache.admit(window, self._columns)
        self.cache, self.seed, self.features, self.token = cache, seed, tuple(features), token
        self.window, self.stored = window, stored
        self._told: tuple[int, int] | None = None
        self._windows = lru_cache(maxsize=2)(self._make_windows)

    def batch(self, start: int, count: int, *, lo: int = 0, hi: int | None = None) -> Any:
        """Rows `lo:hi` of the batch of `count` images that starts at position `start`.

        The same whoever asks and whatever was asked before: ranks take slices of one batch. A
        `Batch`, or with `stored` a `Stored`, whose `to(device)` gives one.
        """
        hi = count if hi is None else hi
        if start < 0 or not 0 <= lo <= hi <= count:
            raise DataError(f"rows {lo}:{hi} of a batch of {count} at {start} do not exist")
        self._tell(start)
        positions = np.arange(start + lo, start + hi, dtype=np.int64)
        flipped = self.flipped(positions) if self.flip else None
        read = self.cache.read_stored if self.stored else self.cache.read
        return read(self.rows(positions), features=self.features, token=self.token, flipped=flipped)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Row of the cache at each position of the stream, int64."""
        number = len(self.cache)
        epochs, places = np.divmod(positions, number)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            if self.window:
                rows[here] = self._windows(int(epoch)).rows(places[here])
            else:
                key = seeded(self.seed, "epoch", int(epoch))
                rows[here] = permuted(places[here], number, key=key)
        return rows

    def coming(self, start: int) -> np.ndarray:
        """The shards read from position `start` on, in order: this window's and the next one's.

        Without a window, all of them, those first that the next rows lie in.
        """
        shard_rows, number = self.cache.shard_rows, len(self.cache)
        if not self.window:
            rows = self.rows(np.arange(start, start + min(number, _FIRST)))
            shards = np.searchsorted(np.cumsum(shard_rows), rows, side="right")
            return _unique(np.concatenate([shards, np.arange(len(shard_rows))]))
        epoch, place = divmod(start, number)
        here = self._windows(epoch)
        group = int(here.group(np.array([place]))[0])
        after = here.shards(group + 1)
        return np.concatenate(
            [here.shards(group), after if len(after) else self._windows(epoch + 1).shards(0)]
        )

    def _tell(self, start: int) -> None:
        """Let the cache know what is coming, once a window."""
        epoch, place = divmod(start, len(self.cache))
        now = (0, 0)
        if self.window:
            now = epoch, int(self._windows(epoch).group(np.array([place]))[0])
        if now != self._told:
            self._told = now
            self.cache.expect(lambda: self.coming(start), self._columns)

    def _make_windows(self, epoch: int) -> "Windows":
        return Windows(self.cache.shard_rows, self.window, key=seeded(self.seed, "epoch", epoch))

    def flipped(self, positions: np.ndarray) -> np.ndarray:
        """A fair coin for each position of the stream, bool."""
        key = np.uint64(seeded(self.seed, "flip"))
        return (_mix(positions.astype(np.uint64) ^ key) >> np.uint64(63)).astype(bool)


class Windows:
    """A random order of the rows of shards: groups of `window` shards, rows mixed within each.

    Shards are dealt to the groups by chance, as `key` decides. Group g takes places
    `ends[g - 1]` to `ends[g]`.
    """

    def __init__(self, shard_rows: np.ndarray, window: int, *, key: int) -> None:
        number = len(shard_rows)
        self._order = permuted(np.arange(number), number, key=seeded(key, "shards"))
        self._window, self._key = window, key
        self._first = (np.cumsum(shard_rows) - shard_rows)[self._order]  # row of the cache
        self._stops = np.cumsum(shard_rows[self._order])  # place, were nothing mixed
        last = np.arange(window, number + window, window).clip(max=number) - 1
        self.ends = self._stops[last]

    def shards(self, group: int) -> np.ndarray:
        """The shards of a group; none after the last."""
        return self._order[group * self._window : (group + 1) * self._window]

    def group(self, places: np.ndarray) -> np.ndarray:
        """The group that each place lies in."""
        return np.searchsorted(self.ends, places, side="right")

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Row of the cache at each place, int64."""
        groups = self.group(places)
        mixed = np.empty_like(places)
        for group in np.unique(groups):
            here = groups == group
            start, stop = (self.ends[group - 1] if group else 0), self.ends[group]
            key = seeded(self._key, "window", int(group))
            mixed[here] = start + permuted(places[here] - start, int(stop - start), key=key)
        slot = np.searchsorted(self._stops, mixed, side="right")
        starts = np.concatenate([[0], self._stops[:-1]])
        return self._first[slot] + mixed - starts[slot]


def _unique(values: np.ndarray) -> np.ndarray:
    """Each value once, where it first comes."""
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]


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


def prefetch(
    fetch: Callable[[int], T], steps: range, *, depth: int = 2, threads: int = 1
) -> Iterator[T]:
    """`fetch(step)` for each step in order, up to `depth` of them made ahead by so many threads.

    Results are those of calling `fetch` directly: it must be a function of its argument. Of a
    cache's batches `Cache.threads` may be made at a time.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
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
