"""Memory that a step frees is there for the next one."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from erw.malloc import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(64, 2**20)  # 256 MiB each time
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default, kept = faults(), keep_freed()
faults()  # the first of them grow the heap
print(int(kept), default, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is told so on Linux alone")
def test_freed_memory_is_not_cleared_anew():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, default, after = map(int, done.stdout.split())
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert after < default / 10
