"""What torch is told about this machine before anything is computed."""

import ctypes

import torch

from pipeline.runtime import threads

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def set_up_torch() -> None:
    """Give torch the processors of this process, and let freed memory be used again.

    glibc gives large buffers back to the system at once, which zeroes them anew for the next
    convolution: a tenth of a forward pass (bench/ratios.py).
    """
    torch.set_num_threads(threads())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in other C libraries
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)
