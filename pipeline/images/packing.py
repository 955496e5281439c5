"""Pack the images of a source: read, hash and decode every file, a shard at a time."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import hash_of, link, whole_folder
from pipeline.images.alike import hashes_of
from pipeline.images.decode import Header, decode, header
from pipeline.images.layout import Item
from pipeline.images.pack import SHARD, Facts, encoded, shard_files, shard_writer
from pipeline.images.sources import Source
from pipeline.progress import Parts, say, track
from pipeline.resume import Resume
from pipeline.runtime import threads

NOTED = ("digests", "hashes", "read")  # of every image of a shard, an array each
AT_ONCE = 128  # images that threads are given to work on, which wait in memory

T = TypeVar("T")
Sides = NDArray[np.int64]


class One(NamedTuple):
    """An image as it is packed, and what is noted of it."""

    content: bytes
    digest: NDArray[np.uint8]  # SHA-256 of the file, (32,)
    hash: np.uint64  # of what it shows
    read: bool  # False: it couldn't be


class Packed(NamedTuple):
    """What is noted of all images, in their order."""

    digests: NDArray[np.uint8]  # (N, 32)
    hashes: NDArray[np.uint64]  # (N,)
    read: NDArray[np.bool_]  # (N,)
    pixels: str  # SHA-256 over all shards
    decoded: int  # images, beside those that an earlier run had packed


def headers(found: Source) -> tuple[Sides, Sides, bool, dict[str, str]]:
    """Read every header that can be read.

    Returns the shorter and the longer sides in pixels, whether all images are grey, and the files
    that can't be read with the reason.
    """

    def look(item: Item) -> Header | DataError:
        try:
            return header(found.folder / item.path)
        except DataError as error:
            return error

    unreadable: dict[str, str] = {}
    sides, grey = array("q"), True
    for item, seen in zip(found.items, _in_threads(look, found.items), strict=True):
        if isinstance(seen, DataError):
            unreadable[item.path] = str(seen)
        else:
            sides.extend((seen.short, seen.long))
            grey = grey and seen.grey
    short, long = np.array(sides, np.int64).reshape(-1, 2).T
    return short, long, grey, unreadable


def pack(
    resume: Resume, found: Source, facts: Facts, unreadable: dict[str, str], out: Path
) -> Packed:
    """Read, hash, decode and pack every file, a shard at a time, into `out`.

    Shards that an earlier run had done are kept; adds to `unreadable`.
    """
    n, shards = len(found.items), resume.folder / "shards"
    parts = {shards / f"{i // SHARD:05}": slice(i, min(i + SHARD, n)) for i in range(0, n, SHARD)}
    missing = {shard: part for shard, part in parts.items() if not _is_whole(shard, facts)}
    left = sum(part.stop - part.start for part in missing.values())
    if left < n:
        say(f"going on at {n - left} of {n}")

    def made() -> Iterator[Item]:
        for shard, part in missing.items():
            with whole_folder(shard) as folder:
                yield from _write_shard(folder, found, part, facts, unreadable)

    sizes = Counter(item.label for part in missing.values() for item in found.items[part])
    by_class = Parts[Item](lambda item: item.label, sizes)
    for _ in track(made(), left, "decode", parts=by_class) if left else ():
        pass  # it is done when all have gone by
    noted: dict[str, list[NDArray[Any]]] = {name: [] for name in NOTED}
    pixels = sha256()
    for shard in parts:
        for file in shard_files(shard, shard.name, facts):
            link(file, out / "images" / file.name)
        pixels.update((shard / "sha256").read_bytes())
        for name, arrays in noted.items():
            arrays.append(np.load(shard / f"{name}.npy"))
    digests, hashes, read = (np.concatenate(arrays) for arrays in noted.values())
    for i in np.flatnonzero(~read):
        if found.items[i].path not in unreadable:
            _packable(found, found.items[i], facts, unreadable)  # an earlier run's, for the reason
    return Packed(digests, hashes, read, pixels.hexdigest(), left)


def _is_whole(shard: Path, facts: Facts) -> bool:
    """Tell whether an earlier run's shard has all its files."""
    noted = [shard / name for name in (*(f"{name}.npy" for name in NOTED), "sha256")]
    return all(file.exists() for file in (*shard_files(shard, shard.name, facts), *noted))


def _write_shard(
    folder: Path, found: Source, part: slice, facts: Facts, unreadable: dict[str, str]
) -> Iterator[Item]:
    """Write some images and what is noted of them into a folder; yields each item once done."""
    items = found.items[part]
    n, digest = len(items), sha256()
    digests, hashes = np.zeros((n, 32), np.uint8), np.zeros(n, np.uint64)
    read = np.zeros(n, np.bool_)
    work = _in_threads(lambda item: _packable(found, item, facts, unreadable), items)
    with shard_writer(folder, folder.name.removesuffix(".part"), n, facts) as write:
        for i, (item, one) in enumerate(zip(items, work, strict=True)):
            digests[i], hashes[i], read[i] = one.digest, one.hash, one.read
            digest.update(one.content)
            write(one.content)
            yield item
    arrays: list[NDArray[Any]] = [digests, hashes, read]
    for name, noted in zip(NOTED, arrays, strict=True):
        np.save(folder / f"{name}.npy", noted)
    (folder / "sha256").write_bytes(digest.digest())
    for file in folder.iterdir():  # before the folder gets its name, also after a power cut
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _packable(found: Source, item: Item, facts: Facts, unreadable: dict[str, str]) -> One:
    """Read, hash, decode and fit one file; a black image, and the reason, where that can't be."""
    file, digest = found.folder / item.path, bytes(32)
    pixels, read = np.zeros(facts.shape, np.uint8), False
    try:
        digest = bytes.fromhex(hash_of(file))
        if item.path not in unreadable:
            pixels, read = decode(file, facts.size, facts.fit, facts.channels), True
    except OSError as error:
        unreadable[item.path] = f"{file}: can't be read ({error.strerror})"
    except DataError as error:
        unreadable[item.path] = str(error)
    hashed = hashes_of(pixels[None])[0]
    return One(encoded(pixels, facts.storage), np.frombuffer(digest, np.uint8), hashed, read)


def _in_threads(work: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Work on items in threads, in their order; some at a time."""
    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])
