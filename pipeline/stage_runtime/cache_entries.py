"""Entries of the local cache, which several runs share: a folder each, with a lock beside it.

A run locks the entry that it works on, and only unlocked entries are deleted. Locks are created,
acquired and deleted under the lock of the root folder, which is held briefly. An entry and its lock
can therefore be deleted together: no other process is about to acquire that lock.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.stage_runtime.distributed import barrier, broadcast
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import cache_bytes, rank

ROOT_LOCK = ".lock"
DELETED = ".deleted-"  # begins the name of an entry that is being deleted
LOOK = 0.2  # seconds between attempts to lock an entry that another run holds


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Create an entry and lock it; if another run holds it, print so once and wait.

    If several processes share a stage, the first one holds the lock for all.
    """
    lock = _lock_of(folder)
    said = False
    while not broadcast(rank() == 0 and _take(folder, lock)):
        if not said:
            say(f"{name}: another run is computing the same; waiting for it")
        said = True
        time.sleep(LOOK)
    try:
        yield
        barrier()  # the other processes may still read there
    finally:
        lock.release()


def discard(own: Path, useless: Callable[[Path], bool]) -> None:
    """Delete the unlocked entries beside `own` that are `useless`."""
    with _whole(own.parent):
        for folder in _others(own):
            if _is_free(folder) and useless(folder):
                _delete(folder)


def make_room(own: Path, needed: float = 0, count_held: bool = True) -> None:
    """Delete other entries, least recently used first, until `needed` more bytes fit.

    Entries that a run holds are never deleted. Their size counts unless `count_held=False`.
    """
    with _whole(own.parent):
        others = [f for f in _others(own) if count_held or _is_free(f)]
        sizes = {folder: _size(folder) for folder in others}
        taken = sum(sizes.values())
        for folder in sorted(others, key=_last_used):
            if taken + needed <= cache_bytes():
                return
            if _delete(folder):
                taken -= sizes[folder]


def _whole(root: Path) -> FileLock:
    """Return the lock of the root folder, to be held briefly."""
    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ROOT_LOCK)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}.lock"))


def _take(folder: Path, lock: FileLock) -> bool:
    with _whole(folder.parent):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        folder.mkdir(exist_ok=True)
        os.utime(folder)
    return True


def _others(own: Path) -> list[Path]:
    """List the other entries. Needs the lock of the root folder, like all functions below."""
    for left in own.parent.glob(f"{DELETED}*"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folders = (path for path in own.parent.iterdir() if path.is_dir())
    return [path for path in folders if path != own and not path.name.startswith(".")]


def _is_free(folder: Path) -> bool:
    try:
        with _lock_of(folder).acquire(blocking=False):
            return True
    except OSError:  # includes Timeout
        return False


def _delete(folder: Path) -> bool:
    """Delete an entry with its lock; return False if a run holds it or the system refuses.

    The entry is renamed first, so that no half-deleted entry is ever found.
    """
    lock = _lock_of(folder)
    try:
        with lock.acquire(blocking=False):
            gone = folder.rename(folder.with_name(f"{DELETED}{folder.name}"))
            shutil.rmtree(gone, ignore_errors=True)
            Path(lock.lock_file).unlink()
    except OSError:  # includes Timeout
        return False
    return True


def _size(folder: Path) -> int:
    """Return an entry's size on disk in bytes, while its run may be renaming files there."""
    size = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                stat = Path(here, name).lstat()
                size += stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
    return size


def _last_used(folder: Path) -> float:
    return folder.stat().st_mtime
