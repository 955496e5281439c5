"""Atomic writes, arrays whose disk space is allocated in advance, and the files below a folder."""

import csv
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.stage_runtime.errors import DataError, PipelineError, one_line

BLOCK = 2**20  # bytes that are written at a time


class Rowwise(Protocol):
    """An array, or an object that returns rows of one by their indices."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[Any]: ...


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces it if no error was raised."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old or the new content, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())  # so that a power cut doesn't leave an empty file
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_bytes(file, text.encode())


def write_csv(file: Path, lines: Iterable[Sequence[object]]) -> None:
    """Write rows, the header first, to a CSV file, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(file, text.getvalue())


def hash_of(file: Path) -> str:
    """Return a file's SHA-256."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def is_formula(cell: str) -> bool:
    """Return whether spreadsheets take a cell for a formula; numbers are not formulas.

    Source: OWASP, CSV Injection.
    """
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return cell[0] in "\t\r"


def path_cell(path: str) -> str:
    """Return a path as a cell of a CSV file, with ./ before it if it looks like a formula."""
    return f"./{path}" if is_formula(path) else path


def shown(name: str) -> str:
    r"""Return a file's name as text, in which bytes that are not UTF-8 are written as \xff."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def text_cell(text: str) -> str:
    """Return a text as a cell of a CSV file, after an apostrophe if it looks like a formula."""
    return f"'{text}" if is_formula(text) else text


def write_json(file: Path, content: object) -> None:
    """Write a JSON file atomically, with keys in the order given and reproducible bytes."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def new_array(file: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Create a memory-mapped array on disk, to be filled.

    Its disk space is allocated at once: on a full disk, writing to a mapping kills the process
    without a message.

    Raises OSError naming the file if the disk is full.
    """
    try:
        array = np.lib.format.open_memmap(file, "w+", np.dtype(dtype), shape)
        with file.open("rb+") as opened:
            _take_room(opened, array.offset, file.stat().st_size)
    except OSError as error:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None
    return array


def _take_room(file: BinaryIO, begin: int, end: int) -> None:
    """Allocate a file's blocks of zeros from `begin` on. Raises OSError if the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, end)
        return
    file.seek(begin)  # macOS, Windows
    for place in range(begin, end, BLOCK):
        file.write(bytes(min(BLOCK, end - place)))


@dataclass
class Tree:
    """The content of a folder: relative paths with forward slashes, without hidden files."""

    files: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # folders with nothing in them
    odd: dict[str, str] = field(default_factory=dict)  # neither file nor folder, and what it is


def walk(path: Path) -> Tree:
    """Find all files below a folder, each once; links to folders are followed.

    A folder's files come first, then its folders, both sorted by name. If two links lead to one
    folder, this order decides which one is followed.

    Raises DataError naming a folder that can't be read.
    """
    tree, seen, left = Tree(), set(), [""]
    while left:
        below = left.pop()
        real = os.path.realpath(path / below)
        if real in seen:
            tree.odd[below.removesuffix("/")] = "a link to a folder that is read already"
            continue
        seen.add(real)
        try:
            with os.scandir(path / below) as entries:
                found = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        except FileNotFoundError:
            continue  # deleted meanwhile, or never there
        except OSError as error:
            raise DataError(
                f"{path / below}: can't be read ({error.strerror}); change its permissions, or "
                "move it away"
            ) from None
        if not found and below:
            tree.empty.append(below.removesuffix("/"))
        folders = []
        for entry in found:
            if _is_folder(entry):
                folders.append(f"{below}{entry.name}/")
            elif kind := _odd(entry):
                tree.odd[below + entry.name] = kind
            else:
                tree.files.append(below + entry.name)
        left += reversed(folders)
    return tree


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # circular links
        return False


def _odd(entry: os.DirEntry[str]) -> str:
    """Return what an entry is if it isn't a regular file, whose reading might block."""
    try:
        if entry.is_file():
            return ""
        mode = entry.stat().st_mode
    except OSError as error:
        return f"a link to nothing ({error.strerror})"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def files_below(path: Path) -> Iterator[Path]:
    """Yield all regular files below a folder, relative to it, as `walk` finds them."""
    yield from map(Path, walk(path).files)


def link(file: Path, target: Path) -> None:
    """Hard-link a file to a second path, or copy it if the disk doesn't support links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(file, part)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(file, part)
    part.replace(target)
    part.unlink(missing_ok=True)  # still there if both are the same file already


@contextmanager
def reading(file: Path, stage: str) -> Iterator[None]:
    """Convert errors from reading a stage's output into a DataError that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; run `dvc repro {stage}`") from None
    except (PipelineError, OSError):
        raise
    except Exception as error:  # damaged bytes raise anything; a NumPy header even SyntaxError
        said = one_line(error, 120)
        raise DataError(
            f"{file}: damaged ({type(error).__name__}: {said}); run `dvc checkout --force`"
        ) from None
