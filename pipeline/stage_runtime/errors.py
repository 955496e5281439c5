"""User errors, one class per kind.

PipelineError
├── ParamError         a key or a value in params.yaml
├── SettingError       an environment variable
├── NetworkError       a network that fails to run, whatever the images
├── ProcessGroupError  a process of the same stage that is gone or can't be reached
├── DataError          the images, their folders, their labels
├── WeightsError       pretrained weights: missing, or of another network
└── CheckpointError    a checkpoint: damaged, or of another network

Each message is one line: what is wrong, where, and what to do.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

# The messages of the CPU allocator, CUDA, its libraries and ONNX Runtime when memory runs out.
NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED"),
    *("Failed to allocate memory", "bad_alloc"),
)

RECOVER = (
    "run the same command to resume; `git checkout models; dvc checkout` restores the earlier "
    "outputs"
)


class PipelineError(Exception):
    """A user error; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class ParamError(PipelineError):
    """A key or a value in params.yaml is wrong."""


class SettingError(PipelineError):
    """An environment variable is wrong."""


class NetworkError(PipelineError):
    """A network fails to run at every usual image size."""


class ProcessGroupError(PipelineError):
    """Another process of the same stage is gone, or can't be reached."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the remaining processes may continue


class DataError(PipelineError):
    """The images, their folders or their labels can't be used."""


class WeightsError(PipelineError):
    """Pretrained weights are missing or belong to another network."""


class CheckpointError(PipelineError):
    """A checkpoint is damaged or belongs to another network or data set."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, PyTorch or ONNX Runtime means that memory ran out.

    PyTorch raises a plain RuntimeError on the CPU, and a class of its own on a GPU.
    """
    if isinstance(error, PipelineError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    kinds = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return True
    compiled = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    return compiled and any(words in str(error) for words in NO_MEMORY)


def one_line(error: BaseException, most: int = 80) -> str:
    """Return an error's message as one line of at most `most` characters, or else its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def suggest(word: str, known: Iterable[str], most: int = 3) -> str:
    """Return the known words closest to `word`, for the end of an error message."""
    known = [str(name) for name in known]
    close = get_close_matches(word, known, n=most, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"expected one of: {shown}"
