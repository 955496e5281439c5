"""A stage by itself: one at a time, none left behind, and someone there to say how it ended.

The work is done in a child process. Its parent passes signals on, tells what killed it, and ends it
when DVC is gone: a killed `dvc repro` leaves its stage running, which would later overwrite the
outputs of the next. Linux alone can do this (prctl, /proc).
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from pipeline.stage_runtime.errors import RECOVER, PipelineError

ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = "interrupted; the same command goes on where it was"
PATIENCE = 5.0  # seconds until who was asked to end is made to
LOOK = 0.5  # seconds between looks at whether DVC is still there
PR_SET_PDEATHSIG = 1
LAUNCHED = "PIPELINE_LAUNCHED"  # in the environment of processes that share a stage
STARTED_BY = ("DVC_STAGE", LAUNCHED)  # in the environment of what ends with who started it


class BusyError(PipelineError):
    """The stage runs in this folder already."""


@contextmanager
def alone(name: str, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock of a stage in this project, which the system takes back when we end.

    Waits a while for one that is just being ended. Raises BusyError naming the other process.
    """
    file = Path(".pipeline") / "locks" / name
    holder = file.with_name(f"{name}.pid")
    try:
        lock = FileLock(file).acquire(timeout=patience)
    except Timeout:
        raise BusyError(
            f"{name} runs in this folder already (process {holder.read_text(encoding='utf-8')}); "
            "wait for it, or end it with kill"
        ) from None
    with lock:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield


def in_a_child(name: str) -> None:
    """Go on in a child process; the caller itself stays to watch, and ends as the child does."""
    sys.stdout.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        os._exit(_watch(name, child))
    end_with(parent)
    for number in ASKED:
        signal.signal(number, _interrupt)


def end_with(parent: int) -> None:
    """Have this process killed when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before that was set
        os._exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for again in ASKED:
        signal.signal(again, signal.SIG_IGN)  # a terminal and the parent may both ask
    raise KeyboardInterrupt


def _watch(name: str, child: int) -> int:
    """Wait for a child, passing signals on; gives the exit code to end with."""
    line = _line_to_dvc()
    signals = _signals()
    asked_at = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        for number in signals(LOOK):
            if number in ASKED:
                os.kill(child, number)
                asked_at = asked_at or time.monotonic()
        if asked_at is not None and time.monotonic() - asked_at > PATIENCE:
            os.kill(child, signal.SIGKILL)
        if any(_parent_of(pid) != above for pid, above in pairwise(line)):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 1
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if asked_at is not None:
        print(INTERRUPTED, file=sys.stderr)
        return 1
    print(f"error: {name} was ended by {_said(-code)}; {RECOVER}", file=sys.stderr)
    return 128 - code


def _signals() -> Callable[[float], bytes]:
    """Catch signals from now on; gives a function that waits for the next ones, at most so long.

    By a pipe, as the system may hand them to any thread, such as those that NumPy starts.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    for number in (*ASKED, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)

    def wait(seconds: float) -> bytes:
        ready, _, _ = select.select([reading], [], [], seconds)
        return os.read(reading, 4096) if ready else b""

    return wait


def _said(number: int) -> str:
    known = {
        signal.SIGKILL: "SIGKILL, as the system does when memory runs out: have fewer programs "
        "open, or smaller images or batches",
        signal.SIGBUS: "SIGBUS: a disk is full or was taken away",
    }
    return known.get(signal.Signals(number), signal.Signals(number).name)


def _line_to_dvc() -> list[int]:
    """List our process, its parent, ... up to DVC's; ours alone where nobody started it so."""
    line = [os.getpid()]
    if any(name in os.environ for name in STARTED_BY):
        while line[-1] > 1 and _was_started(line[-1]):
            line.append(_parent_of(line[-1]))
    return line


def _was_started(pid: int) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    marks = tuple(f"{name}=".encode() for name in STARTED_BY)
    return any(value.startswith(marks) for value in environment.split(b"\0"))


def _parent_of(pid: int) -> int:
    """Give a process's parent, 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # behind the name, which may hold anything
