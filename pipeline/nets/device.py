"""The device that networks run on, and the set-up of torch for this machine."""

import ctypes
import os

import torch
from torch import nn

from pipeline.stage_runtime.errors import SettingError
from pipeline.stage_runtime.settings import device_asked, local_rank, threads

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
ROOM = 0.4  # share of a GPU's free memory for images, and for trunk outputs


def device() -> torch.device:
    """Return the device that networks run on: this process's GPU if there is one, else the CPU.

    A GPU is a CUDA device or Apple's (MPS). With several GPUs, each process uses the one of its
    local rank. PIPELINE_DEVICE=cpu disables GPUs. Raises SettingError if the requested device is
    missing, or if there are fewer GPUs than processes.
    """
    asked = device_asked()
    if asked == "cpu":
        return torch.device("cpu")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = asked or next((kind for kind in available if available[kind]), "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if not available[kind]:
        raise SettingError(f"PIPELINE_DEVICE = {kind!r}: {no_gpu()}; unset it, or set it to cpu")
    if kind == "mps":
        return torch.device("mps")
    if local_rank() >= torch.cuda.device_count():
        raise SettingError(
            f"PIPELINE_PROCESSES: more processes than GPUs here ({torch.cuda.device_count()}); "
            "start one per GPU, or set PIPELINE_DEVICE=cpu"
        )
    return torch.device("cuda", local_rank())


def no_gpu() -> str:
    """Return why PyTorch finds no GPU."""
    if torch.version.cuda is None and device_asked() != "mps":
        return f"PyTorch {torch.__version__} is built without CUDA"
    return f"PyTorch {torch.__version__} finds no usable GPU"


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def kernels() -> str:
    """Return the name of the GPU, or of the processor's widest instruction set."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    if device().type == "mps":
        return "Apple GPU"
    return torch.backends.cpu.get_cpu_capability()


def finish() -> None:
    """Wait until the GPU has finished all its work, so that run times are measured correctly."""
    if device().type in ("cuda", "mps"):
        torch.accelerator.synchronize()


def has_room(n_bytes: int, where: torch.device) -> bool:
    """Return whether `n_bytes` may be kept on a GPU; the processor always reads from files."""
    return where.type != "cpu" and n_bytes <= ROOM * memory_of(where)[0]


def memory_of(where: torch.device) -> tuple[int, int]:
    """Return a GPU's free and total memory, in bytes."""
    if where.type == "mps":  # shared with the processor; the limit that Metal recommends
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    return torch.cuda.mem_get_info(where)


def set_up_torch() -> None:
    """Set the number of torch's threads, and make freed memory reusable.

    By default, glibc returns large buffers to the system at once, which zeroes them again for the
    next convolution; this takes a tenth of a forward pass (bench/ratios.py).

    On a GPU, convolutions are deterministic, and float32 is not rounded to TF32.
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
