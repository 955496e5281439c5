"""Pack the images of a source: read, hash and decode every file, a shard at a time."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.decode import Header, decoded, header, measured
from pipeline.dataset.layout import Item
from pipeline.dataset.near_duplicates import hashes_of
from pipeline.dataset.sources import Source
from pipeline.images.shards import SHARD, Facts, encoded, shard_files, shard_writer
from pipeline.images.tones import BRIGHTEST, DARKEST, PLAIN, Seen, Tones
from pipeline.stage_runtime.errors import DataError
from pipeline.stage_runtime.files import hash_of, link, whole_folder
from pipeline.stage_runtime.progress import Breakdown, say, track
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.settings import threads

# What is recorded of every image of a shard, in one array each.
NOTED = {
    **{"digests": np.uint8, "hashes": np.uint64, "read": np.bool_, "clipped": np.float32},
    **{"lowest": np.uint8, "highest": np.uint8, "mean": np.float32},
}
AT_ONCE = 128  # images that are given to threads at a time, whose results wait in memory

T = TypeVar("T")
Sides = NDArray[np.int64]


class One(NamedTuple):
    """An image as it is packed, and what is recorded of it."""

    content: bytes
    digests: NDArray[np.uint8]  # SHA-256 of the file, (32,)
    hashes: np.uint64  # perceptual
    read: bool  # False: unreadable
    clipped: float  # the share of its values outside the data set's range
    lowest: int  # of its packed pixels, without a thousandth at either end
    highest: int
    mean: float


class Packed(NamedTuple):
    """What is recorded of all images, in order."""

    digests: NDArray[np.uint8]  # (N, 32)
    hashes: NDArray[np.uint64]  # (N,)
    read: NDArray[np.bool_]  # (N,)
    clipped: NDArray[np.float32]  # (N,), and so on
    lowest: NDArray[np.uint8]
    highest: NDArray[np.uint8]
    mean: NDArray[np.float32]
    pixels: str  # SHA-256 over all shards
    decoded: int  # images, without those that an earlier run had packed


@dataclass
class Survey:
    """The headers of all images, and the necessary measurements, before any is packed."""

    short: Sides  # pixels of the shorter side, (N,); 0: unreadable
    long: Sides
    grey: NDArray[np.bool_]  # (N,), and so on
    deep: NDArray[np.bool_]  # more than 8 bits a value
    format: NDArray[np.int64]  # an index into `formats`
    formats: list[str]
    seen: dict[int, Seen]  # of deep and of transparent images
    unreadable: dict[str, str]  # why, by path

    @property
    def read(self) -> NDArray[np.bool_]:
        """Return which images are readable, (N,)."""
        return self.short > 0

    @property
    def is_grey(self) -> bool:
        """Return whether all readable images are grey."""
        return bool(self.grey[self.read].all())

    @property
    def is_deep(self) -> bool:
        """Return whether most images have more than 8 bits per value."""
        return 2 * int(self.deep[self.read].sum()) > int(self.read.sum())


def survey(found: Source) -> Survey:
    """Read all headers, and measure images that are deep or transparent.

    If there are two bit depths, images of the rarer one count as unreadable: their values mean
    something else.
    """

    def look(item: Item) -> tuple[Header, Seen | None] | DataError:
        file = found.folder / item.path
        try:
            of_file = header(file)
            return of_file, measured(file) if of_file.deep or of_file.clear else None
        except DataError as error:
            return error

    unreadable, seen, formats = dict[str, str](), dict[int, Seen](), dict[str, int]()
    columns = tuple(array("q") for _ in range(5))  # lists of a million images would be large
    for i, one in enumerate(_in_threads(look, found.items)):
        if isinstance(one, DataError):
            unreadable[found.items[i].path] = str(one)
            row = (0, 0, 0, 0, 0)
        else:
            head, values = one
            form = formats.setdefault(head.format, len(formats))
            row = (head.short, head.long, int(head.grey), int(head.deep), form)
            if values:
                seen[i] = values
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    short, long, grey, deep, format_of = (np.array(column, np.int64) for column in columns)
    whole = Survey(short, long, grey == 1, deep == 1, format_of, list(formats), seen, unreadable)
    for i in np.flatnonzero(whole.read & (whole.deep != whole.is_deep)).tolist():
        has, others = ("8", "more") if whole.is_deep else ("more than 8", "8")
        path = found.items[i].path
        unreadable[path] = (
            f"{found.folder / path}: has {has} bits a value, and most pictures have {others}; "
            "convert it"
        )
        short[i] = 0
        seen.pop(i, None)
    return whole


def pack(
    resume: Resume, found: Source, facts: Facts, unreadable: dict[str, str], out: Path
) -> Packed:
    """Read, hash, decode and pack every file, a shard at a time, to `out`.

    Shards that an earlier run completed are kept. Unreadable files are added to `unreadable`.
    """
    n, shards = len(found.items), resume.folder / _of_tones("shards", facts.tones)
    parts = {shards / f"{i // SHARD:05}": slice(i, min(i + SHARD, n)) for i in range(0, n, SHARD)}
    missing = {shard: part for shard, part in parts.items() if not _is_whole(shard, facts)}
    left = sum(part.stop - part.start for part in missing.values())
    if left < n:
        say(f"resuming at {n - left} of {n}")

    def made() -> Iterator[Item]:
        for shard, part in missing.items():
            with whole_folder(shard) as folder:
                yield from _write_shard(folder, found, part, facts, unreadable)

    sizes = Counter(item.label for part in missing.values() for item in found.items[part])
    by_class = Breakdown[Item](lambda item: item.label, sizes)
    for _ in track(made(), left, "decode", parts=by_class) if left else ():
        pass  # iterating writes the shards
    noted: dict[str, list[NDArray[Any]]] = {name: [] for name in NOTED}
    pixels = sha256()
    for shard in parts:
        for file in shard_files(shard, shard.name, facts):
            link(file, out / "images" / file.name)
        pixels.update((shard / "sha256").read_bytes())
        for name, arrays in noted.items():
            arrays.append(np.load(shard / f"{name}.npy"))
    joined = {name: np.concatenate(of_shards) for name, of_shards in noted.items()}
    for i in np.flatnonzero(~joined["read"]):
        if found.items[i].path not in unreadable:
            _packable(found, found.items[i], facts, unreadable)  # again, for the reason
    return Packed(**joined, pixels=pixels.hexdigest(), decoded=left)


def _of_tones(name: str, tones: Tones) -> str:
    """Name a folder after the tones of its content, which may change once splits are drawn."""
    return name if tones == PLAIN else f"{name}-{sha256(repr(tones).encode()).hexdigest()[:8]}"


def _is_whole(shard: Path, facts: Facts) -> bool:
    """Return whether an earlier run's shard has all its files."""
    noted = [shard / name for name in (*(f"{name}.npy" for name in NOTED), "sha256")]
    return all(file.exists() for file in (*shard_files(shard, shard.name, facts), *noted))


def _write_shard(
    folder: Path, found: Source, part: slice, facts: Facts, unreadable: dict[str, str]
) -> Iterator[Item]:
    """Write some images and what is recorded of them to a folder; yield each item once done."""
    items = found.items[part]
    n, digest = len(items), sha256()
    ones: list[One] = []
    work = _in_threads(lambda item: _packable(found, item, facts, unreadable), items)
    with shard_writer(folder, folder.name.removesuffix(".part"), n, facts) as write:
        for item, one in zip(items, work, strict=True):
            ones.append(one._replace(content=b""))
            digest.update(one.content)
            write(one.content)
            yield item
    for name, dtype in NOTED.items():
        np.save(folder / f"{name}.npy", np.array([getattr(one, name) for one in ones], dtype))
    (folder / "sha256").write_bytes(digest.digest())
    for file in folder.iterdir():  # on disk before the folder is renamed, also after a power cut
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _packable(found: Source, item: Item, facts: Facts, unreadable: dict[str, str]) -> One:
    """Read, hash, decode and fit one file; if unreadable, use a black image and add the reason."""
    file, digest = found.folder / item.path, bytes(32)
    pixels, clipped, read = np.zeros(facts.shape, np.uint8), 0.0, False
    try:
        digest = bytes.fromhex(hash_of(file))
        if item.path not in unreadable:
            shape = (facts.size, facts.fit, facts.channels)
            pixels, clipped = decoded(file, *shape, facts.tones)
            read = True
    except OSError as error:
        unreadable[item.path] = f"{file}: can't be read ({error.strerror})"
    except DataError as error:
        unreadable[item.path] = str(error)
    hashed = hashes_of(pixels[None])[0]
    counts = np.bincount(pixels.reshape(-1), minlength=256)
    ends = np.searchsorted(counts.cumsum(), counts.sum() * np.array([DARKEST, BRIGHTEST]))
    mean = float(counts @ np.arange(256) / counts.sum())
    content, key = encoded(pixels, facts.storage), np.frombuffer(digest, np.uint8)
    return One(content, key, hashed, read, clipped, int(ends[0]), int(ends[1]), mean)


def _in_threads(work: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Yield the results of work on items, in order, from threads, some at a time."""
    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])
