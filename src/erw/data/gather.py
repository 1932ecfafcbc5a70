"""Rows picked from many shards, gathered column by column into arrays in the order of a batch."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .buffers import BUFFERS
from .codec import from_numpy
from .shards import DTYPES, ShardReader, Span

_READERS = min(8, os.cpu_count() or 1)  # threads that read one batch
_SHARED = 4 << 20  # bytes from which they share it

Request = tuple[int, int, int, int]  # shard, byte of its column, bytes of the batch: from, to


class Located(NamedTuple):
    """Located rows, shard by shard: which shard, row and variant in it, place in the batch."""

    shard: np.ndarray
    row: np.ndarray
    variant: np.ndarray
    place: np.ndarray


class Target(NamedTuple):
    """A column on its way into an array: its name, the array's bytes, what to read into them.

    `span` is that of the batch's first shard; all others must have numbers of that shape.
    """

    name: str
    span: Span
    flat: memoryview
    requests: list[Request]


def gather(
    columns: Sequence[tuple[str, bool]], rows: Located, *, shard: Callable[[int], ShardReader]
) -> list[Tensor]:
    """Columns of the located rows, in batch order, as they are stored.

    `columns` are names, and whether a row holds two variants of that column; `shard` opens one by
    its number.
    """
    number = int(rows.shard[0]) if len(rows.shard) else 0
    spans = [shard(number).span(name) for name, _ in columns]
    found, targets = [], []
    for (name, varied), span in zip(columns, spans, strict=True):
        shape, width = span.shape[1 if varied else 0 :], span.row_bytes // (2 if varied else 1)
        start = rows.row * span.row_bytes + (rows.variant * width if varied else 0)
        values = BUFFERS.empty((len(rows.place), *shape), DTYPES[span.dtype][1])
        requests = _requests(rows, start, width) if len(rows.place) else []
        targets.append(Target(name, span, values.reshape(-1).view(np.uint8).data, requests))
        found.append(from_numpy(values, span.dtype))
    # Copying is what it costs, and a cold disk wants many requests at once.
    threads = _READERS if sum(len(target.flat) for target in targets) >= _SHARED else 1
    own, *others = (
        [target._replace(requests=target.requests[i::threads]) for target in targets]
        for i in range(threads)
    )
    if not others:
        _read(own, shard)
        return found
    with ThreadPoolExecutor(len(others)) as pool:
        rest = pool.map(_read, others, repeat(shard))
        _read(own, shard)
        list(rest)
    return found


def _requests(rows: Located, start: np.ndarray, width: int) -> list[Request]:
    """What to read of a column, in one piece where rows both lie and go next to each other."""
    breaks = (np.diff(rows.shard) != 0) | (np.diff(start) != width) | (np.diff(rows.place) != 1)
    first = np.flatnonzero(np.concatenate([[True], breaks]))
    begin = rows.place[first] * width
    end = begin + np.diff(np.append(first, len(start))) * width
    columns = (rows.shard[first], start[first], begin, end)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _read(targets: Sequence[Target], shard: Callable[[int], ShardReader]) -> None:
    """Fill the targets. A plain loop around one system call, since there are thousands a batch."""
    for name, span, flat, requests in targets:
        opened, reader = -1, None
        for number, start, begin, end in requests:
            if number != opened:
                reader = None  # a full store of shards may need its room
                opened, reader = number, shard(number)
                file, first = reader.where(name, like=span)
            if os.preadv(file, (flat[begin:end],), first + start) != end - begin:
                shard(number).read(name, start, flat[begin:end])  # goes on, or says what is wrong
