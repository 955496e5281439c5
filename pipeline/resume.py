"""How far a stage got, kept outside its outputs, so that after a kill it goes on from there.

The state lies in the local cache, in a folder named by a hash of all that the stage's result
depends on: another param, line of code, input or number of threads starts anew. A finished stage's
outputs stay there too, until DVC has recorded them: killed in between, they are put back.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import TeamError
from pipeline.files import files_below, link, new_array, write_json
from pipeline.progress import say
from pipeline.runtime import (
    cache_folder,
    may_shrink,
    rank,
    save_seconds,
    team_size,
    threads,
)
from pipeline.team import agree, wait

T = TypeVar("T")
Array = NDArray[Any]
CODE = Path(__file__).parent
STATES = 2  # kept of each stage, the last ones used


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
        agree(done)
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
        wait()
        return [np.load(self.file(name), mmap_mode="r") for name in names] if arrays else []

    def _followed(
        self, names: Sequence[str], n: int, compute: Callable[[int], Iterable[Sequence[Array]]]
    ) -> list[Array]:
        """Do a part of the work, and read what the first process wrote of all."""
        done = agree(0)
        for _ in compute(done) if done < n else ():
            pass
        wait()
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
        if not agree(file.exists()):
            computed = compute()
            if rank() == 0:
                write_json(file, computed)
            wait()
        value: T = json.loads(file.read_text(encoding="utf-8"))
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
        kept = self.folder / "kept.json"
        if not kept.exists():
            return False
        try:
            for i, file in enumerate(json.loads(kept.read_text(encoding="utf-8"))["files"]):
                link(self.folder / "outs" / str(i), Path(file))
        except FileNotFoundError:  # somebody cleaned up: the stage runs once more
            _delete(self.folder)
            return False
        return True

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
        try:
            progress: dict[str, int] = json.loads(self._progress_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return progress

    @property
    def _progress_file(self) -> Path:
        return self.folder / "progress.json"


def resume_of(stage: str, arguments: dict[str, Any], inputs: Iterable[Path]) -> Resume:
    """Give the state of a stage with these arguments on these inputs, and make room for it.

    States whose stage DVC has recorded since then are deleted, and so are all but the last ones.
    Processes that share a stage share its state, which the first one keeps. If they may go on with
    fewer when a host is lost, their number is no part of its name.

    Raises TeamError where a process doesn't see the first one's cache.
    """
    depends = [
        str(Path.cwd()),  # two projects may share a cache, not a state
        sorted((name, repr(value)) for name, value in arguments.items()),
        [(str(path), _contents(path)) for path in inputs],
        [(str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in _code()],
        os.environ.get("PIPELINE_DEVICE"),
        None if may_shrink() else (threads(), team_size(), os.environ.get("OMP_NUM_THREADS")),
    ]
    key = agree(hashlib.sha256(json.dumps(depends).encode()).hexdigest())
    root = cache_folder() / "resume"
    own = root / f"{stage}-{key[:24]}"
    if rank() > 0:
        wait()
        if not own.is_dir():
            raise TeamError(
                f"{own.absolute()}: not seen by process {rank()}; processes that share a stage "
                "need one folder at one place, and one PIPELINE_CACHE"
            )
        return Resume(own)
    lock = Path("dvc.lock")
    recorded = lock.read_text(encoding="utf-8") if lock.exists() else ""
    states = sorted(root.glob(f"{stage}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    others = 0
    for folder in states:
        others += folder != own
        if _is_recorded(folder, recorded) or (folder != own and others >= STATES):
            _delete(folder)
    own.mkdir(parents=True, exist_ok=True)
    os.utime(own)
    wait()
    return Resume(own)


def _is_recorded(folder: Path, lock: str) -> bool:
    """Tell whether dvc.lock has the outputs that a state keeps: no two runs take equally long."""
    kept = folder / "kept.json"
    return kept.exists() and json.loads(kept.read_text(encoding="utf-8"))["recorded"] in lock


def _code() -> list[Path]:
    """List the files of the code, and the one that names the libraries' versions."""
    versions = CODE.parent / "pyproject.toml"
    return sorted(CODE.rglob("*.py")) + ([versions] if versions.exists() else [])


def _contents(path: Path) -> list[tuple[str, int, int]]:
    """List the files at a path with their sizes and times, by which DVC knows them too."""
    files = [path] if path.is_file() else [path / file for file in files_below(path)]
    found = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:  # a link to nothing
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _written(outs: Sequence[Path], since: float) -> list[Path]:
    """List the files that came to these places since then: others may write there too."""
    files = (f for out in outs for f in ([out] if out.is_file() else sorted(out.rglob("*"))))
    return [f for f in files if f.is_file() and f.stat().st_ctime >= since - 1]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
