"""Where and how fast: read from the environment, never from params, and never in a result."""

import ctypes
import os
from pathlib import Path

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def threads() -> int:
    """Count the processors this process may use; PIPELINE_THREADS overrides it."""
    return int(os.environ.get("PIPELINE_THREADS", "0")) or len(os.sched_getaffinity(0))


def set_up_torch() -> None:
    """Give torch the processors of this process, and let freed memory be used again.

    glibc gives large buffers back to the system at once, which zeroes them anew for the next
    convolution; a third of a forward pass went there.
    """
    import torch

    torch.set_num_threads(threads())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in other C libraries
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)


def cache_folder() -> Path:
    """Give the folder for what can be computed again; PIPELINE_CACHE names another disk."""
    folder = Path(os.environ.get("PIPELINE_CACHE", ".pipeline"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes() -> float:
    """Give how much may be put there; PIPELINE_CACHE_GB overrides 16."""
    return float(os.environ.get("PIPELINE_CACHE_GB", "16")) * 1e9
