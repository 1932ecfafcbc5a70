"""Memory for batches: in huge pages, and used again once nothing refers to it any longer.

What a system does to give a process new pages (find them, clear them, map them) takes as long as
copying rows into them. A loader asks for the same few sizes at every step, so it keeps them.
"""

import mmap
import weakref

import numpy as np
from numpy.typing import DTypeLike

_LARGE = 1 << 20  # bytes; smaller arrays are malloc's
_KEPT = 8  # free buffers of one size, and sizes


class _Lease:
    """Stands between a buffer and the arrays of it: gone when the last of them is.

    An array of another array would not do, since NumPy lets views refer to the innermost one.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__


class Buffers:
    """Hands out arrays. Memory whose arrays, views and tensors are all gone is handed out again."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """As `np.empty`. Any thread may ask, and any may drop the last reference."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        if size < _LARGE:
            return np.empty(shape, kind)
        if size not in self._free and len(self._free) >= _KEPT:
            self._free.clear()
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = _mapped(size)
        lease = _Lease(memory)
        weakref.finalize(lease, _give_back, free, memory).atexit = False
        return np.asarray(lease).view(kind).reshape(shape)


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < _KEPT:
        free.append(memory)


def _mapped(size: int) -> np.ndarray:
    """uint8 (size,) in pages of its own, huge ones where the system has them."""
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


BUFFERS = Buffers()
"""This process's."""
