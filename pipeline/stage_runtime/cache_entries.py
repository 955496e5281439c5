"""Entries of the local cache that several runs share: a folder each, with a lock beside it.

A run holds the entry that it works on, and only entries that nobody holds are deleted. Locks are
created, taken and deleted under the lock of the whole root, which is held for a moment only. So an
entry and its lock can be deleted together: no other process is about to take that lock.
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
LOOK = 0.2  # seconds between looks at an entry that another run holds


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Create an entry and hold it; wait for another run that holds it, and say so once.

    Of several processes that share a stage the first one holds it for all.
    """
    lock = _lock_of(folder)
    said = False
    while not broadcast(rank() == 0 and _take(folder, lock)):
        if not said:
            say(f"{name}: another run computes the same; waiting for it")
        said = True
        time.sleep(LOOK)
    try:
        yield
        barrier()  # the other processes may still read there
    finally:
        lock.release()


def discard(own: Path, useless: Callable[[Path], bool]) -> None:
    """Delete those of the other entries beside `own` that nobody holds and that are useless."""
    with _whole(own.parent):
        for folder in _others(own):
            if _is_free(folder) and useless(folder):
                _delete(folder)


def make_room(own: Path, needed: float = 0, count_held: bool = True) -> None:
    """Delete other entries, those used longest ago first, until `needed` bytes fit beside them.

    Entries that a run holds are never deleted. They count as taken, or not with `count_held=False`.
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
    """Return the lock of a whole root, to be held for a moment."""
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
    """List the other entries. Only under the lock of the whole root, as all that follows."""
    for left in own.parent.glob(f"{DELETED}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folders = (path for path in own.parent.iterdir() if path.is_dir())
    return [path for path in folders if path != own and not path.name.startswith(".")]


def _is_free(folder: Path) -> bool:
    try:
        with _lock_of(folder).acquire(blocking=False):
            return True
    except OSError:  # Timeout is one
        return False


def _delete(folder: Path) -> bool:
    """Delete an entry with its lock; return False if a run holds it or the system refuses.

    It loses its name first, so that no entry is ever found half deleted.
    """
    lock = _lock_of(folder)
    try:
        with lock.acquire(blocking=False):
            gone = folder.rename(folder.with_name(f"{DELETED}{folder.name}"))
            shutil.rmtree(gone, ignore_errors=True)
            Path(lock.lock_file).unlink()
    except OSError:  # Timeout is one
        return False
    return True


def _size(folder: Path) -> int:
    """Return the bytes of an entry on disk; its run may be renaming files there."""
    size = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                stat = Path(here, name).lstat()
                size += stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
    return size


def _last_used(folder: Path) -> float:
    return folder.stat().st_mtime
