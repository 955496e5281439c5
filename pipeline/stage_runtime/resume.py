"""How far a stage got, kept outside its outputs, so that after a kill it goes on from there.

The state lies in the local cache, in a folder named by a hash of all that the stage's result
depends on: another param, line of the stage's own code, input or number of threads starts anew.
The project's folder is no part of it, so a run goes on in another one. A finished stage's outputs
stay there too, until DVC has recorded them: killed in between, they are put back.
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
DAY = 24 * 3600.0  # seconds that a finished stage's outputs are kept for who runs the same


class Resume:
    """What one run of a stage keeps; an empty folder where it begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def filled(
        self, names: Sequence[str], n: int, compute: Callable[[int], Iterable[Sequence[Array]]]
    ) -> list[Array]:
        """Fill arrays (n, ...) row by row, of which `compute(first)` yields the next few of each.

        Rows that an earlier run filled aren't asked for again. Gives the arrays to be read, none
        where n is 0.
        """
        if rank() > 0:
            return self._followed(names, n, compute)
        arrays, done = self._begun(names, n)
        broadcast(done)
        if done:
            say(f"going on at {done} of {n}")
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
        """Do a part of the work, and read what the first process wrote of all."""
        done = broadcast(0)
        for _ in compute(done) if done < n else ():
            pass
        barrier()
        return [np.load(self.file(name), mmap_mode="r") for name in names] if n else []

    def is_filled(self, name: str, n: int) -> bool:
        """Tell whether all rows of an array are there."""
        return self._progress().get(name) == n and bool(self._begun([name], n)[1])

    def file(self, name: str) -> Path:
        """Give where an array lies."""
        return self.folder / f"{name}.npy"

    def remember(self, name: str, compute: Callable[[], T]) -> T:
        """Compute a value once: numbers, texts, lists, dictionaries, as JSON holds them."""
        file = self.folder / "values" / hashlib.sha256(name.encode()).hexdigest()[:20]
        if not broadcast("value" in _read(file)):
            computed = compute()
            if rank() == 0:
                write_json(file, {"value": computed})
            barrier()
        value: T = json.loads(file.read_text(encoding="utf-8"))["value"]
        return value

    def keep(self, outs: Sequence[Path], timing: Path, since: float) -> None:
        """Keep what a stage wrote since then, in place of how far it got."""
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
        """Put the outputs of a finished stage back; tells whether there were any."""
        if not _is_finished(self.folder):
            return False
        try:
            for i, file in enumerate(_read(self.folder / "kept.json")["files"]):
                link(self.folder / "outs" / str(i), Path(file))
        except (FileNotFoundError, KeyError):  # somebody cleaned up: the stage runs once more
            self.clear()
            return False
        return True

    def clear(self) -> None:
        """Delete what is kept."""
        for path in self.folder.iterdir():
            _delete(path)

    def _begun(self, names: Sequence[str], n: int) -> tuple[list[Array], int]:
        """Open arrays that are partly filled; none if one of them isn't whole."""
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
    """Hold the state of a stage with these arguments, on these inputs, for as long as it runs.

    Waits for another run that holds it. Inputs count by their content, sources, which are read
    once, by size and time. Processes that share a stage share its state, which the first one keeps.

    Raises TeamError where a process doesn't see the first one's cache.
    """
    key = broadcast(_key(arguments, inputs, sources) if rank() == 0 else "")
    own = cache_folder() / "resume" / f"{stage}-{key[:24]}"
    with hold(own, stage):
        if not own.is_dir():
            raise ProcessGroupError(
                f"{own.absolute()}: not seen by process {rank()}; processes that share a stage "
                "need one folder at one place, and one PIPELINE_CACHE"
            )
        resume = Resume(own)
        if rank() == 0:
            _clean_up(resume, stage)
        yield resume


def _clean_up(resume: Resume, stage: str) -> None:
    """Delete states that nobody goes on with, but none that a run holds.

    A finished one goes when DVC has recorded its outputs here, or after a day. Others stay as long
    as those that no run holds fit into the cache; the ones used longest ago go first.
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
    """Tell whether dvc.lock has the outputs that a state keeps: no two runs take equally long."""
    recorded = _read(folder / "kept.json").get("recorded")
    return isinstance(recorded, str) and recorded in lock


def _age(folder: Path) -> float:
    """Return for how many seconds a stage has been finished."""
    return time.time() - (folder / "kept.json").stat().st_mtime


def _key(arguments: dict[str, Any], inputs: Sequence[Path], sources: Sequence[Path]) -> str:
    """Hash all that a stage's result depends on.

    Paths count as they are given, most often relative, and not by the folder that they start from.
    The number of processes doesn't count where a stage may go on with fewer when a host is lost.
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
    """Name what this processor can do, which decides how it rounds: hosts may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux
        return platform.processor()
    told = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def own_code() -> list[Path]:
    """List the code that this process has loaded of the project, and what names the versions.

    What starts or shows a stage can't change its result. Templates beside a module are code, too.
    """
    loaded = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    files = {Path(file) for file in loaded if file.startswith(f"{CODE}{os.sep}")}
    files -= {CODE / "__init__.py", CODE / "__main__.py"}
    files = {file for file in files if file.parent.name not in ("launcher", "commands")}
    templates = {t for folder in {f.parent for f in files} for t in folder.glob("*.html")}
    versions = CODE.parent / "pyproject.toml"
    return sorted(files | templates) + ([versions] if versions.exists() else [])


def _contents(paths: Sequence[Path]) -> list[tuple[str, str, str]]:
    """List the files at some paths, with their places below the path and hashes of their bytes."""
    places = [(path, file) for path in paths for file in _files_at(path)]
    with ThreadPoolExecutor(threads()) as pool:
        hashed = pool.map(lambda place: _digest(place[0] / place[1]), places)
        digests = list(track(hashed, len(places), "hash inputs", summary=False))
    return [(str(p), str(f), d) for (p, f), d in zip(places, digests, strict=True)]


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file; nothing for a link to nothing."""
    try:
        return hash_of(file)
    except FileNotFoundError:
        return ""


def _sizes_and_times(path: Path) -> list[tuple[str, int, int]]:
    """List the files at a path with their sizes and times, by which DVC knows them too."""
    found = []
    for file in _files_at(path):
        try:
            stat = (path / file).stat()
        except OSError:  # a link to nothing
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return found


def _files_at(path: Path) -> list[Path]:
    """List the files below a folder, relative to it, in order; a file is itself."""
    return [Path()] if path.is_file() else sorted(files_below(path))


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a dictionary; empty if it isn't there or isn't readable."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(outs: Sequence[Path], since: float) -> list[Path]:
    """List the files that came to these places since then: others may write there too."""
    files = (f for out in outs for f in ([out] if out.is_file() else sorted(out.rglob("*"))))
    return [f for f in files if f.is_file() and f.stat().st_ctime >= since - 1]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
