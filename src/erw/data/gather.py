"""Rows picked from many shards, gathered column by column into arrays in the order of a batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from erw.data.buffers import BUFFERS
from erw.data.codec import from_numpy
from erw.data.shards import DTYPES, SINGLE, Kind, ShardReader

_AHEAD = 7  # shards whose rows a disk is asked for before they are copied


class Located(NamedTuple):
    """Located rows, shard by shard: which shard, row and variant in it, place in the batch."""

    shard: np.ndarray
    row: np.ndarray
    variant: np.ndarray
    place: np.ndarray


def gather(
    columns: Mapping[str, Kind],
    rows: Located,
    *,
    variants: int,
    shard: Callable[[int], ShardReader],
) -> list[Tensor]:
    """Columns of the located rows, in batch order, as they are stored.

    `columns` tells what each is to hold; `shard` gives the file of a shard that they all lie in, by
    the shard's number. Raises `CacheError` where one holds something else.
    """
    kinds = list(columns.values())
    found = [BUFFERS.empty((len(rows.place), *shape), DTYPES[dtype][1]) for dtype, shape in kinds]
    # Lists, since a batch of ImageNet lies in hundreds of shards and arrays are slow to slice.
    places, single = rows.place.tolist(), rows.row.tolist()
    varied = (variants * rows.row + rows.variant).tolist()
    picked = [single if name in SINGLE else varied for name in columns]
    for number, start, stop in _visits(columns, picked, rows.shard, shard):
        reader = shard(number)
        for name, kind, pick, into in zip(columns, kinds, picked, found, strict=True):
            values = reader.values(name, kind)
            for at in range(start, stop):
                into[places[at]] = values[pick[at]]
        del reader, values  # a full store of shards may need its room for the next
    return [from_numpy(values, dtype) for values, (dtype, _) in zip(found, kinds, strict=True)]


def _visits(
    columns: Iterable[str],
    picked: Sequence[list[int]],
    shards: np.ndarray,
    shard: Callable[[int], ShardReader],
) -> Iterator[tuple[int, int, int]]:
    """Each shard with the span of its rows, which a disk was asked for some shards before."""
    asked: deque[tuple[int, int, int]] = deque()
    edges = np.flatnonzero(np.diff(shards, prepend=-1, append=-1)).tolist()
    for start, stop in pairwise(edges):
        number = int(shards[start])
        reader = shard(number)
        for name, pick in zip(columns, picked, strict=True):
            reader.will_read(name, pick[start:stop])
        del reader
        asked.append((number, start, stop))
        if len(asked) > _AHEAD:
            yield asked.popleft()
    yield from asked
