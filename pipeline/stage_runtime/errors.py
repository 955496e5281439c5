"""What can go wrong for a user, one class per kind.

PipelineError
├── ParamError        params.yaml: a key or a value
├── SettingError      the environment: a variable that says where and how fast
├── NetworkError      a network fails while it runs, whatever the images
├── TeamError         processes that share a stage: one is gone, or can't be reached
├── DataError         the images, their folders, their labels
├── WeightsError      pretrained weights: not there, or not of this network
└── CheckpointError   a checkpoint of ours: not one, or of another network

Each message is one line: what is wrong, where, and what to do.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

# How the processor's allocator, CUDA, its libraries and ONNX Runtime say that memory ran out.
NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED"),
    *("Failed to allocate memory", "bad_alloc"),
)

RECOVER = (
    "the same command goes on where it was; `git checkout models; dvc checkout` brings the earlier "
    "outputs back"
)


class PipelineError(Exception):
    """A user's error; the command line prints it as one line and exits with this code."""

    exit_code = 1


class ParamError(PipelineError):
    """A key or a value in params.yaml is wrong."""


class SettingError(PipelineError):
    """A variable of the environment is wrong."""


class NetworkError(PipelineError):
    """A network fails while it runs, at every usual size of images."""


class ProcessGroupError(PipelineError):
    """Another process of the same stage is gone, or can't be reached."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: with those who are left it may go on


class DataError(PipelineError):
    """The images, their folders or their labels can't be used."""


class WeightsError(PipelineError):
    """Pretrained weights are missing or belong to another network."""


class CheckpointError(PipelineError):
    """A checkpoint is damaged or belongs to another network or data set."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: Python's, PyTorch's or ONNX Runtime's.

    PyTorch raises a plain RuntimeError on the processor, and a class of its own on a GPU.
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
    """Return what an error says in one line of at most `most` characters, or else its class."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def suggest(word: str, known: Iterable[str], most: int = 3) -> str:
    """Name the known words nearest to `word`, for the end of an error message."""
    known = [str(name) for name in known]
    close = get_close_matches(word, known, n=most, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known are: {shown}"
