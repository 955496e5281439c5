"""Where networks run, and what torch is told about this machine before anything is computed."""

import ctypes
import os

import torch
from torch import nn

from pipeline.stage_runtime.errors import SettingError
from pipeline.stage_runtime.settings import device_asked, local_rank, threads

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
ROOM = 0.4  # of a GPU's free memory that may be filled with images, and with trunk outputs


def device() -> torch.device:
    """Return where networks run: a GPU if there is one, of several that of this process's place.

    A GPU is one of CUDA, or Apple's (MPS). PIPELINE_DEVICE=cpu leaves it alone. Raises SettingError
    where the one that is asked for isn't there, or there are too few.
    """
    asked = device_asked()
    if asked == "cpu":
        return torch.device("cpu")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = asked or next((kind for kind in available if available[kind]), "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if not available[kind]:
        raise SettingError(f"PIPELINE_DEVICE = {kind!r}: {no_gpu()}; leave it out, or say cpu")
    if kind == "mps":
        return torch.device("mps")
    if local_rank() >= torch.cuda.device_count():
        raise SettingError(
            f"PIPELINE_PROCESSES: more processes than GPUs here ({torch.cuda.device_count()}); "
            "start one a GPU, or set PIPELINE_DEVICE=cpu"
        )
    return torch.device("cuda", local_rank())


def no_gpu() -> str:
    """Say why PyTorch finds no GPU."""
    if torch.version.cuda is None and device_asked() != "mps":
        return f"PyTorch {torch.__version__} is built without CUDA"
    return f"PyTorch {torch.__version__} finds no GPU that it can use"


def device_of(model: nn.Module) -> torch.device:
    """Give where a network is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def kernels() -> str:
    """Name what computes: the GPU, or the processor's widest instructions."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    if device().type == "mps":
        return "Apple GPU"
    return torch.backends.cpu.get_cpu_capability()


def finish() -> None:
    """Wait until a GPU has done all it was given, for who takes the time."""
    if device().type in ("cuda", "mps"):
        torch.accelerator.synchronize()


def has_room(n_bytes: int, where: torch.device) -> bool:
    """Tell whether so many bytes may be kept on a GPU; never on the processor, which has files."""
    return where.type != "cpu" and n_bytes <= ROOM * memory_of(where)[0]


def memory_of(where: torch.device) -> tuple[int, int]:
    """Return a GPU's free memory, and all of it, in bytes."""
    if where.type == "mps":  # the processor's own; what Metal advises a program to use
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return torch.cuda.mem_get_info(where)


def set_up_torch() -> None:
    """Give torch the processors of this process, and let freed memory be used again.

    glibc gives large buffers back to the system at once, which zeroes them anew for the next
    convolution: a tenth of a forward pass (bench/ratios.py).

    On a GPU, convolutions are the ones that repeat to the bit, and float32 is not rounded to TF32.
    """
    torch.set_num_threads(threads())
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):  # not in other C libraries
        assert libc is not None
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)
    if device().type == "cuda":
        torch.cuda.set_device(device())
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
