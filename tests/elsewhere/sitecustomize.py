"""Hides what other systems than Linux lack: fcntl, prctl, mallopt, /proc, fork and the like.

On the module path (`PYTHONPATH=tests/elsewhere`) Python imports it at each start. The libraries
that know every system's own ways, such as psutil, and DVC, still see them.
"""

import builtins
import ctypes
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DVC_NO_ANALYTICS", "1")  # which DVC sends by a fork
OURS = f"{os.sep}pipeline{os.sep}"
# Of Windows filelock has another one that the system takes back.
warnings.filterwarnings("ignore", "only soft file lock")
for name in ("fork", "sched_getaffinity", "posix_fallocate"):
    if hasattr(os, name):
        delattr(os, name)


class Library(ctypes.CDLL):
    """The C library of another system."""

    def __getattr__(self, name: str) -> Any:
        """Refuse what only Linux and glibc have."""
        if name in ("prctl", "mallopt"):
            raise AttributeError(name)
        return super().__getattr__(name)


def without_fcntl(name: str, *more: Any, **options: Any) -> Any:
    """Import, but no fcntl into locks."""
    if name == "fcntl" and sys._getframe(1).f_globals.get("__name__", "").startswith("filelock"):
        raise ImportError(name)
    return _import(name, *more, **options)


def without_proc(opened: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that opens files, but none of /proc for the project."""

    def guarded(file: Any, *more: Any, **options: Any) -> Any:
        if str(file).startswith("/proc"):
            frame = sys._getframe(1)
            while frame.f_back and "pathlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if OURS in frame.f_code.co_filename:
                raise FileNotFoundError(2, "hidden", str(file))
        return opened(file, *more, **options)

    return guarded


_import = builtins.__import__
builtins.__import__ = without_fcntl
builtins.open, io.open = without_proc(builtins.open), without_proc(io.open)
ctypes.CDLL = Library  # type: ignore[misc]
