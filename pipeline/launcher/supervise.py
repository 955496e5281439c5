"""Supervision of a stage: one process at a time, no orphans, and an error if it was killed.

The work is done in a child process. Its parent, the supervisor, forwards signals, reports what
killed it, and ends it when DVC is gone: a killed `dvc repro` leaves its stage running, which would
later overwrite the outputs of the next run.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

import psutil
from filelock import FileLock, Timeout

from pipeline.stage_runtime.errors import RECOVER, PipelineError

ASKED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
INTERRUPTED = "interrupted; run the same command to resume"
PATIENCE = 5.0  # seconds from a forwarded signal until the child is killed
LOOK = 0.5  # seconds between checks that DVC is still there
PR_SET_PDEATHSIG = 1
SUPERVISOR = "PIPELINE_SUPERVISOR"  # in a child's environment: its parent's process id
LAUNCHED = "PIPELINE_LAUNCHED"  # in the environment of processes that share a stage
STARTED_BY = ("DVC_STAGE", LAUNCHED)  # in the environment of processes that end with their parent


class BusyError(PipelineError):
    """The stage is already running in this folder."""


@contextmanager
def stage_lock(name: str, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock of a stage in this project; the system releases it when this process ends.

    Waits `patience` seconds for a process that is just ending. Raises BusyError naming the process.
    """
    file = Path(".pipeline") / "locks" / name
    holder = file.with_name(f"{name}.pid")
    try:
        lock = FileLock(file).acquire(timeout=patience)
    except Timeout:
        raise BusyError(
            f"{name} is already running in this folder (process "
            f"{holder.read_text(encoding='utf-8')}); wait for it, or end it with kill"
        ) from None
    with lock:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield


def supervised(name: str) -> None:
    """Continue in a child process, which runs the same command; the caller exits with its code."""
    supervisor = int(os.environ.get(SUPERVISOR, "0"))
    if supervisor and not psutil.pid_exists(supervisor):  # gone before its child began
        sys.exit(1)
    if supervisor != os.getppid():
        sys.stdout.flush()
        sys.exit(_watched(name))
    end_with(supervisor)


def be_interruptible() -> None:
    """Raise KeyboardInterrupt at the first signal that asks this process to end."""
    for number in ASKED:
        signal.signal(number, _interrupt)


def end_with(parent: int) -> None:
    """Have this process killed when its parent dies."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError, TypeError):  # not Linux
        threading.Thread(target=_end_after, args=[parent], daemon=True).start()
    if os.getppid() != parent:  # gone before that was set
        os._exit(1)


def dying_with_us() -> Callable[[], None] | None:
    """Return the `preexec_fn` with which a new process, of any program, ends with this one.

    None on systems without support: there, only processes that watch their parent end with it.
    """
    return partial(end_with, os.getpid()) if sys.platform == "linux" else None


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Ask a session leader, and all processes of its group, to end."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()


def _end_after(parent: int) -> None:
    while os.getppid() == parent and psutil.pid_exists(parent):
        time.sleep(LOOK)
    os._exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for again in ASKED:
        signal.signal(again, signal.SIG_IGN)  # a terminal and the parent may both send one
    raise KeyboardInterrupt


def _watched(name: str) -> int:
    """Run this command in a child process, forward signals, and return the exit code."""
    line = _line_to_dvc()
    asked: list[float] = []  # times of the signals

    def passed_on(number: int, frame: FrameType | None) -> None:
        asked.append(time.monotonic())
        with suppress(ValueError):  # Windows sends no SIGINT to one process
            child.send_signal(number)

    words = [sys.executable, *sys.orig_argv[1:]]
    child = subprocess.Popen(words, env={**os.environ, SUPERVISOR: str(os.getpid())})  # noqa: S603
    for number in ASKED:
        signal.signal(number, passed_on)
    while True:
        try:
            code = child.wait(LOOK)
            break
        except subprocess.TimeoutExpired:
            pass
        if asked and time.monotonic() - asked[0] > PATIENCE:
            child.kill()
        if not all(map(psutil.Process.is_running, line)):
            child.kill()
            child.wait()
            return 1
    if code >= 0:
        return code
    if asked:
        print(INTERRUPTED, file=sys.stderr)
        return 1
    print(f"error: {name} was killed by {_said(-code)}; {RECOVER}", file=sys.stderr)
    return 128 - code


def _said(number: int) -> str:
    known = {
        "SIGKILL": "SIGKILL, which the system sends when memory runs out: close other programs, or "
        "use smaller images or batches",
        "SIGBUS": "SIGBUS: a disk is full or was removed",
    }
    name = signal.Signals(number).name
    return known.get(name, name)


def _line_to_dvc() -> list[psutil.Process]:
    """List this process, its parent, ... up to DVC's; only this one if DVC didn't start it."""
    line = [psutil.Process()]
    if any(name in os.environ for name in STARTED_BY):
        with suppress(psutil.Error):
            while (parent := line[-1].parent()) and _was_started(line[-1]):
                line.append(parent)
    return line


def _was_started(process: psutil.Process) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:  # of another user
        return False
    return any(name in environment for name in STARTED_BY)
