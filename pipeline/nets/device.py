"""Where networks run, and what torch is told about this machine before anything is computed."""

import ctypes

import torch
from torch import nn

from pipeline.stage_runtime.errors import SettingError
from pipeline.stage_runtime.settings import device_asked, local_rank, threads

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
ROOM = 0.4  # of a GPU's free memory that may be filled with images, and with trunk outputs


def device() -> torch.device:
    """Give where networks run: a GPU if there is one, of several that of this process's place.

    PIPELINE_DEVICE=cpu leaves it alone. Raises SettingError where there are too few.
    """
    if device_asked() == "cpu" or not (torch.cuda.is_available() or device_asked()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingError(f"PIPELINE_DEVICE = 'cuda': {no_gpu()}; leave it out, or say cpu")
    if local_rank() >= torch.cuda.device_count():
        raise SettingError(
            f"PIPELINE_PROCESSES: more processes than GPUs here ({torch.cuda.device_count()}); "
            "start one a GPU, or set PIPELINE_DEVICE=cpu"
        )
    return torch.device("cuda", local_rank())


def no_gpu() -> str:
    """Say why PyTorch finds no GPU."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return f"PyTorch {torch.__version__} finds no GPU that it can use"


def device_of(model: nn.Module) -> torch.device:
    """Give where a network is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def kernels() -> str:
    """Name what computes: the GPU, or the processor's widest instructions."""
    if device().type == "cuda":
        return torch.cuda.get_device_name(device())
    return torch.backends.cpu.get_cpu_capability()


def finish() -> None:
    """Wait until a GPU has done all it was given, for who takes the time."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def has_room(n_bytes: int, where: torch.device) -> bool:
    """Tell whether so many bytes may be kept on a GPU; never on the processor, which has files."""
    return where.type == "cuda" and n_bytes <= ROOM * torch.cuda.mem_get_info(where)[0]


def set_up_torch() -> None:
    """Give torch the processors of this process, and let freed memory be used again.

    glibc gives large buffers back to the system at once, which zeroes them anew for the next
    convolution: a tenth of a forward pass (bench/ratios.py).

    On a GPU, convolutions are the ones that repeat to the bit, and float32 is not rounded to TF32.
    """
    torch.set_num_threads(threads())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in other C libraries
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)
    if device().type == "cuda":
        torch.cuda.set_device(device())
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
