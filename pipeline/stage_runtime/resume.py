"""Resume state: what a killed stage needs to continue, stored outside its outputs.

The state is a folder in the local cache. Its name is a hash of all that the stage's result depends
on: with other params, code of the stage, inputs or number of threads, the stage starts from the
beginning. The path of the project's folder is not part of it, so a run can resume in another one.
The state also keeps a finished stage's outputs until DVC has recorded them; if DVC is killed before
that, they are restored.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.stage_runtime.cache_entries import discard, hold, make_room
from pipeline.stage_runtime.distributed import barrier, broadcast
from pipeline.stage_runtime.errors import ProcessGroupError
from pipeline.stage_runtime.files import files_below, hash_of, link, new_array, write_json
from pipeline.stage_runtime.progress import say, track
from pipeline.stage_runtime.settings import (
    cache_folder,
    is_elastic,
    rank,
    save_seconds,
    threads,
    world_size,
)

T = TypeVar("T")
Array = NDArray[Any]
CODE = Path(__file__).parents[1]
DAY = 24 * 3600.0  # seconds for which a finished stage's outputs are kept for identical runs


class Resume:
    """The resume state of one run of a stage; an empty folder at its start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def filled(
        self, names: Sequence[str], n: int, compute: Callable[[int], Iterable[Sequence[Array]]]
    ) -> list[Array]:
        """Fill arrays (n, ...) in order; `compute(first)` yields the next few rows of each.

        Rows that an earlier run filled aren't computed again. Returns the arrays, to be read; none
        if n is 0.
        """
        if rank() > 0:
            return self._followed(names, n, compute)
        arrays, done = self._begun(names, n)
        broadcast(done)
        if done:
            say(f"resuming at {done} of {n}")
        saved = time.monotonic()
        for parts in compute(done) if done < n else ():
            if not arrays:
                self.folder.mkdir(parents=True, exist_ok=True)
                shapes = ((n, *part.shape[1:]) for part in parts)
                arrays = [
                    new_array(self.file(name), part.dtype, shape)
                    for name, part, shape in zip(names, parts, shapes, strict=True)
                ]
            for array, part in zip(arrays, parts, strict=True):
                array[done : done + len(part)] = part
            done += len(parts[0])
            if time.monotonic() - saved >= save_seconds() and done < n:
                self._record(names, arrays, done)
                saved = time.monotonic()
        if arrays:
            self._record(names, arrays, done)
        barrier()
        return [np.load(self.file(name), mmap_mode="r") for name in names] if arrays else []

    def _followed(
        self, names: Sequence[str], n: int, compute: Callable[[int], Iterable[Sequence[Array]]]
    ) -> list[Array]:
        """Compute this process's part, and return the arrays that the first process wrote."""
        done = broadcast(0)
        for _ in compute(done) if done < n else ():
            pass
        barrier()
        return [np.load(self.file(name), mmap_mode="r") for name in names] if n else []

    def is_filled(self, name: str, n: int) -> bool:
        """Return whether all rows of an array are filled."""
        return self._progress().get(name) == n and bool(self._begun([name], n)[1])

    def file(self, name: str) -> Path:
        """Return the path of an array."""
        return self.folder / f"{name}.npy"

    def remember(self, name: str, compute: Callable[[], T]) -> T:
        """Return a value, which must be valid JSON; compute it unless an earlier run did."""
        file = self.folder / "values" / hashlib.sha256(name.encode()).hexdigest()[:20]
        if not broadcast("value" in _read(file)):
            computed = compute()
            if rank() == 0:
                write_json(file, {"value": computed})
            barrier()
        value: T = json.loads(file.read_text(encoding="utf-8"))["value"]
        return value

    def keep(self, outs: Sequence[Path], timing: Path, since: float) -> None:
        """Keep what a stage wrote since `since`, and delete the state of its progress."""
        files = [*_written(outs, since), timing]
        for i, file in enumerate(files):
            link(file, self.folder / "outs" / str(i))
        recorded = hashlib.md5(timing.read_bytes(), usedforsecurity=False).hexdigest()
        write_json(
            self.folder / "kept.json",
            {"recorded": recorded, "files": [str(file) for file in files]},
        )
        for path in self.folder.iterdir():
            if path.name not in ("outs", "kept.json"):
                _delete(path)

    def put_back(self) -> bool:
        """Restore the outputs of a finished stage; return whether there were any."""
        if not _is_finished(self.folder):
            return False
        try:
            for i, file in enumerate(_read(self.folder / "kept.json")["files"]):
                link(self.folder / "outs" / str(i), Path(file))
        except (FileNotFoundError, KeyError):  # someone deleted files: the stage runs again
            self.clear()
            return False
        return True

    def clear(self) -> None:
        """Delete what is kept."""
        for path in self.folder.iterdir():
            _delete(path)

    def _begun(self, names: Sequence[str], n: int) -> tuple[list[Array], int]:
        """Return partly filled arrays and their number of rows; none if one is damaged."""
        progress = self._progress()
        done = min(progress.get(name, 0) for name in names)
        if not done:
            return [], 0
        try:
            arrays = [
                np.load(self.file(name), mmap_mode="r+" if done < n else "r") for name in names
            ]
        except (OSError, ValueError):
            return [], 0
        return (arrays, done) if all(len(array) == n for array in arrays) else ([], 0)

    def _record(self, names: Sequence[str], arrays: Sequence[Array], done: int) -> None:
        for array in arrays:
            if isinstance(array, np.memmap) and array.mode != "r":
                array.flush()
        write_json(self._progress_file, {**self._progress(), **dict.fromkeys(names, done)})

    def _progress(self) -> dict[str, int]:
        return {k: n for k, n in _read(self._progress_file).items() if isinstance(n, int)}

    @property
    def _progress_file(self) -> Path:
        return self.folder / "progress.json"


@contextmanager
def held_resume(
    stage: str,
    arguments: dict[str, Any],
    inputs: Sequence[Path],
    sources: Sequence[Path] = (),
) -> Iterator[Resume]:
    """Hold the state of a stage with these arguments and inputs while the stage runs.

    Waits for another run that holds it. Inputs are compared by content; sources, which are read
    once, by size and time. Processes that share a stage share its state, which the first one holds.

    Raises ProcessGroupError if a process doesn't see the first one's cache.
    """
    key = broadcast(_key(arguments, inputs, sources) if rank() == 0 else "")
    own = cache_folder() / "resume" / f"{stage}-{key[:24]}"
    with hold(own, stage):
        if not own.is_dir():
            raise ProcessGroupError(
                f"{own.absolute()}: not visible to process {rank()}; processes that share a stage "
                "need the same project folder at the same path, and the same PIPELINE_CACHE"
            )
        resume = Resume(own)
        if rank() == 0:
            _clean_up(resume, stage)
        yield resume


def _clean_up(resume: Resume, stage: str) -> None:
    """Delete states that are no longer needed, but none that a run holds.

    A finished state is deleted when DVC has recorded its outputs here, or after a day. Unfinished
    states stay while all unlocked ones fit into the cache; the least recently used go first.
    """
    own, lock = resume.folder, Path("dvc.lock")
    recorded = lock.read_text(encoding="utf-8") if lock.exists() else ""
    if _is_recorded(own, recorded):
        resume.clear()

    def useless(folder: Path) -> bool:
        if not _is_finished(folder):
            return False
        of_stage = folder.name.startswith(f"{stage}-")
        return (of_stage and _is_recorded(folder, recorded)) or _age(folder) > DAY

    discard(own, useless)
    make_room(own, count_held=False)


def _is_finished(folder: Path) -> bool:
    return (folder / "kept.json").exists()


def _is_recorded(folder: Path, lock: str) -> bool:
    """Return whether dvc.lock has a state's timings: no two runs take equally long."""
    recorded = _read(folder / "kept.json").get("recorded")
    return isinstance(recorded, str) and recorded in lock


def _age(folder: Path) -> float:
    """Return the number of seconds since a stage finished."""
    return time.time() - (folder / "kept.json").stat().st_mtime


def _key(arguments: dict[str, Any], inputs: Sequence[Path], sources: Sequence[Path]) -> str:
    """Hash all that a stage's result depends on.

    Paths are hashed as given, usually relative, without the folder that they start from. The number
    of processes is left out if a stage may continue with fewer when a host is lost.
    """
    depends = [
        sorted((name, repr(value)) for name, value in arguments.items()),
        _contents(inputs),
        [(str(path), _sizes_and_times(path)) for path in sources],
        [(str(file.relative_to(CODE.parent)), _digest(file)) for file in own_code()],
        os.environ.get("PIPELINE_DEVICE"),
        _processor(),
        None if is_elastic() else (threads(), world_size(), os.environ.get("OMP_NUM_THREADS")),
    ]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _processor() -> str:
    """Return the processor's model and features, which determine its rounding.

    Hosts with other processors may share a cache.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    told = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def own_code() -> list[Path]:
    """List the project's code that this process has loaded, and the file that pins the versions.

    Code that starts or displays a stage can't change its result and is left out. Templates beside a
    module count as code.
    """
    loaded = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    files = {Path(file) for file in loaded if file.startswith(f"{CODE}{os.sep}")}
    files -= {CODE / "__init__.py", CODE / "__main__.py"}
    files = {file for file in files if file.parent.name not in ("launcher", "commands")}
    templates = {t for folder in {f.parent for f in files} for t in folder.glob("*.html")}
    versions = CODE.parent / "pyproject.toml"
    return sorted(files | templates) + ([versions] if versions.exists() else [])


def _contents(paths: Sequence[Path]) -> list[tuple[str, str, str]]:
    """List the files at some paths: the path, the relative path below it, and the SHA-256."""
    places = [(path, file) for path in paths for file in _files_at(path)]
    with ThreadPoolExecutor(threads()) as pool:
        hashed = pool.map(lambda place: _digest(place[0] / place[1]), places)
        digests = list(track(hashed, len(places), "hash inputs", summary=False))
    return [(str(p), str(f), d) for (p, f), d in zip(places, digests, strict=True)]


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file; empty for a dangling link."""
    try:
        return hash_of(file)
    except FileNotFoundError:
        return ""


def _sizes_and_times(path: Path) -> list[tuple[str, int, int]]:
    """List the files at a path with their sizes and times, which DVC compares too."""
    found = []
    for file in _files_at(path):
        try:
            stat = (path / file).stat()
        except OSError:  # a dangling link
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return found


def _files_at(path: Path) -> list[Path]:
    """List the files below a folder, relative to it, sorted; for a file, only itself."""
    return [Path()] if path.is_file() else sorted(files_below(path))


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a dictionary; empty if it is missing or unreadable."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(outs: Sequence[Path], since: float) -> list[Path]:
    """List the files written below these paths since `since`: others may write there too."""
    files = (f for out in outs for f in ([out] if out.is_file() else sorted(out.rglob("*"))))
    return [f for f in files if f.is_file() and f.stat().st_ctime >= since - 1]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
