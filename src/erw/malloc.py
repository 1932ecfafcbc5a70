"""What malloc does with memory that is freed."""

import ctypes
import sys

# The parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed() -> bool:
    """Let this process keep the memory that it frees; whether its malloc can be told so.

    A step on a CPU frees its activations and gradients, and the next one asks for the same sizes
    again. By default glibc hands large blocks back to the system, which then clears every page of
    them anew: about 6 % of the quickstart's time. The most that the process ever holds stays the
    same; it only holds it longer.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
