"""Memory of batches is used again when, and only when, nothing refers to it."""

import os
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from erw.data.buffers import Buffers
from erw.data.codec import from_numpy

SHAPE = (4, 3, 2**18)  # 3 MiB of int8


def address(array: np.ndarray | Tensor) -> int:
    return array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data


def test_memory_comes_back_once_its_array_is_gone():
    buffers = Buffers()
    first = buffers.empty(SHAPE, np.int8)
    where = address(first)
    first[:] = 7
    assert first.shape == SHAPE and first.dtype == np.int8 and first.flags.writeable
    del first
    assert address(buffers.empty(SHAPE, np.int8)) == where


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array[1:][:2].reshape(-1)[5:],  # NumPy refers such views to the innermost
        lambda array: array.view(np.uint8).data,
        lambda array: from_numpy(array, "int8"),
        lambda array: from_numpy(array, "float8_e4m3fn")[2].view(-1),
        lambda array: from_numpy(array.view(np.uint16), "bfloat16").flatten(1)[3:],
        lambda array: from_numpy(array, "int8").numpy()[:1],
    ],
    ids=["views", "memoryview", "tensor", "float8", "bfloat16", "array of a tensor"],
)
def test_nothing_that_is_referred_to_is_handed_out(keep):
    buffers = Buffers()
    array = buffers.empty(SHAPE, np.int8)
    where = address(array)
    kept = keep(array)
    del array
    others = [buffers.empty(SHAPE, np.int8) for _ in range(3)]
    assert where not in [address(other) for other in others]
    del kept
    assert address(buffers.empty(SHAPE, np.int8)) == where


def test_sizes_do_not_add_up():
    buffers = Buffers()
    for rows in range(1, 60):
        buffers.empty((rows, 2**20), np.int8)
    many = [buffers.empty(SHAPE, np.int8) for _ in range(300)]
    del many
    buffers.empty(SHAPE, np.int8)
    assert sum(memory.nbytes for memory in buffers._free) <= 2**29


def test_small_arrays_are_ordinary_ones():
    buffers = Buffers()
    assert buffers.empty((3, 2), np.float32).base is None
    assert buffers.empty((0, 5), "<f4").shape == (0, 5) and not buffers._back


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_memory_of_its_own():
    buffers = Buffers()
    kept, free = buffers.empty(SHAPE, np.int8), buffers.empty(SHAPE, np.int8)
    kept[:] = 7
    del free
    child = os.fork()
    if not child:
        kept[:] = 9
        buffers.empty(SHAPE, np.int8)[:] = 9
        os._exit(0)
    os.waitpid(child, 0)
    assert (kept == 7).all() and (buffers.empty(SHAPE, np.int8) != 9).all()


def test_threads_never_share_memory():
    buffers = Buffers()
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            mine = torch.from_numpy(buffers.empty((2**20,), np.int8))
            mine.fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
