"""Memory for batches: in huge pages, and used again once nothing refers to it any longer.

What a system does to give a process new pages (find them, clear them, map them) takes as long as
copying rows into them. A loader asks for the same few sizes at every step, so it keeps them.
"""

import mmap
import os
import threading
import weakref
from collections import deque

import numpy as np
from numpy.typing import DTypeLike

_LARGE = 1 << 20  # bytes; smaller arrays are malloc's
_KEPT = 1 << 29  # bytes of free buffers, of all sizes together


class _Lease:
    """Stands between a buffer and the arrays of it: gone when the last of them is.

    An array of another array would not do, since NumPy lets views refer to the innermost one.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__


class Buffers:
    """Hands out arrays. Memory whose arrays, views and tensors are all gone is handed out again."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as a forked process must: a thread that it lacks may have held the lock."""
        self._lock = threading.Lock()
        self._free: list[np.ndarray] = []  # that came back last stands last
        # Where memory comes back to: at any moment, in any thread, so without the lock.
        self._back: deque[np.ndarray] = deque()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """As `np.empty`. Any thread may ask, and any may drop the last reference."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        if size < _LARGE:
            return np.empty(shape, kind)
        with self._lock:
            memory = self._kept(size)
        if memory is None:
            memory = _mapped(size)
        lease = _Lease(memory)
        weakref.finalize(lease, self._back.append, memory).atexit = False
        return np.asarray(lease).view(kind).reshape(shape)

    def _kept(self, size: int) -> np.ndarray | None:
        """A free buffer of that size, if there is one; the oldest of too many are let go."""
        while self._back:
            self._free.append(self._back.popleft())
        places = [i for i, memory in enumerate(self._free) if memory.nbytes == size]
        found = self._free.pop(places[-1]) if places else None
        while sum(memory.nbytes for memory in self._free) > _KEPT:
            del self._free[0]
        return found


def _mapped(size: int) -> np.ndarray:
    """uint8 (size,) in pages of this process's own, huge ones where the system has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.empty(size, np.uint8)
    # Python would share it with forked processes, which then write into each other's batches.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


BUFFERS = Buffers()
"""This process's."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUFFERS.forget)
