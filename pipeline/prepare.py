"""Prepare: list the images of a source, audit, split, decode each once, pack as uint8."""

import csv
import os
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from annotated_types import Ge, Interval
from numpy.typing import NDArray

from pipeline.errors import DataError, ParamError, near
from pipeline.files import link, whole_folder, write_json
from pipeline.images import audit, sources
from pipeline.images.alike import clusters_alike, hashes_of
from pipeline.images.decode import Header, decode, header
from pipeline.images.fetch import hash_of, images_at
from pipeline.images.findings import summary
from pipeline.images.pack import (
    SHARD,
    SPLITS,
    Facts,
    Fit,
    Images,
    Storage,
    encoded,
    shard_files,
    shard_writer,
)
from pipeline.images.published import published
from pipeline.images.sources import Item, Source
from pipeline.images.split import draw, numbered, together
from pipeline.progress import Parts, say, track
from pipeline.resume import Resume
from pipeline.runtime import threads
from pipeline.stage import READS, Out, Seed, main

TORCHVISION = "torchvision/"
AT_ONCE = 128  # images that threads are given to work on, which wait in memory

T = TypeVar("T")
Fraction = Annotated[float, Interval(ge=0, lt=1)]
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


def prepare(
    *,
    out: Out,
    source: str,
    path: Annotated[str, READS],
    url: str,
    sha256: str,
    not_images: Literal["refuse", "skip"],
    size: Annotated[int, Interval(ge=16, le=2048)],
    fit: Fit,
    storage: Storage,
    split_by: Literal["group", "image"],
    test_fraction: Fraction,
    val_fraction: Annotated[float, Interval(gt=0, lt=1)],
    val_as: Literal["val", "test"],
    least_per_class: Annotated[int, Ge(2)],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Decode every image once, audit and split the set, and pack it as square uint8 arrays.

    Writes index.csv, facts.json, audit.json and images/, of all splits in shards, into `out`.

    Raises DataError for a set that can't be used, naming the file or the class.
    """
    found = _source(source, Path(path), url, sha256)
    if found.not_images and not_images == "refuse":
        raise DataError(
            f"{found.folder / found.not_images[0]}: not an image ({len(found.not_images)} such "
            "files); move it away, or set prepare.not_images: skip"
        )
    classes = sorted({item.label for item in found.items})
    if len(classes) < 2:
        raise DataError(f"{found.folder}: one class only ({classes}); two or more are needed")
    _refuse_names(found, classes)
    with whole_folder(out) as folder:
        short, long, grey, unreadable = _headers(found)
        facts = Facts(classes, size, fit, 1 if grey else 3, storage, pixels="")
        start = time.perf_counter()
        packed = _pack(resume, found, facts, unreadable, folder)
        facts = replace(facts, pixels=packed.pixels)
        rate = packed.decoded / (time.perf_counter() - start)
        if unreadable and not_images == "refuse":
            raise DataError(
                f"{next(iter(unreadable.values()))}; move it away, or set prepare.not_images: skip"
            )
        ids = np.flatnonzero(packed.read)
        items = [found.items[i] for i in ids]
        alike = clusters_alike(Images(folder, facts, ids), packed.hashes[ids])
        digests = packed.digests[ids]
        copies = np.unique(digests.view("V32")[:, 0], return_inverse=True)[1]
        number = {name: i for i, name in enumerate(classes)}
        labels = np.fromiter((number[item.label] for item in items), np.int64)
        ties = _ties(items, copies, alike, split_by)
        splits = _splits(items, labels, ties, test_fraction, val_fraction, val_as, seed)
        splits = _without_copies(splits, copies)
        _refuse_small(labels[splits == 0], classes, least_per_class)

        names = [SPLITS[split] if split >= 0 else "" for split in splits]
        sides = audit.sides(short, long, size)
        report = audit.report(items, names, copies, alike, sides, found.not_images, unreadable)
        write_json(folder / "audit.json", report)
        write_json(folder / "facts.json", asdict(facts))
        _write_index(folder / "index.csv", ids, items, names, ties, digests)
    for line in summary(report):
        say(line)
    return {"images_per_second": rate} if packed.decoded else {}


def _source(name: str, path: Path, url: str, sha256: str) -> Source:
    """List the images of a source by its name in params.yaml."""
    if name.startswith(TORCHVISION):
        return sources.folder(published(name.removeprefix(TORCHVISION), path))
    known: dict[str, Callable[[], Source]] = {
        "elpv": sources.elpv,
        "hymenoptera": lambda: sources.hymenoptera(path),
        "folder": lambda: sources.folder(images_at(path, url, sha256)),
        "csv": lambda: sources.table(images_at(path, url, sha256)),
    }
    if name not in known:
        hint = near(name, [*known, f"{TORCHVISION}CIFAR10"])
        raise ParamError(f"params.yaml: prepare.source = {name!r}: {hint}")
    return known[name]()


def _refuse_names(found: Source, classes: Sequence[str]) -> None:
    """Refuse names that would do harm where index.csv and predictions.csv are read."""
    named = chain((("class", c) for c in classes), (("path", item.path) for item in found.items))
    for what, name in named:
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
            raise DataError(f"{what} {name!r} has control characters in it; rename it")
        if name[0] in "=+-@" and not _is_number(name.partition("/")[0]):
            raise DataError(
                f"{what} {name!r} begins with {name[0]!r}, as spreadsheets' formulas do; rename it"
            )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _headers(found: Source) -> tuple[Sides, Sides, bool, dict[str, str]]:
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


def _pack(
    resume: Resume, found: Source, facts: Facts, unreadable: dict[str, str], out: Path
) -> Packed:
    """Read, hash, decode and pack every file, a shard at a time, into `out`.

    Shards that an earlier run had done are kept; adds to `unreadable`.
    """
    n, shards = len(found.items), resume.folder / "shards"
    parts = {shards / f"{i // SHARD:05}": slice(i, min(i + SHARD, n)) for i in range(0, n, SHARD)}
    missing = {shard: part for shard, part in parts.items() if not shard.exists()}
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
    noted: dict[str, list[NDArray[Any]]] = {"digests": [], "hashes": [], "read": []}
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
    for name, noted in (("digests", digests), ("hashes", hashes), ("read", read)):
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


def _ties(
    items: Sequence[Item],
    copies: NDArray[np.int64],
    alike: NDArray[np.int64],
    split_by: Literal["group", "image"],
) -> NDArray[np.int64]:
    """Number what must stay in one split: equal files always, and if asked for a group.

    An image without a group of its own is in that of its near duplicates.
    """
    if split_by == "image":
        return together(copies)
    groups = numbered(item.group for item in items)
    return together(copies, groups, np.where(groups < 0, alike, -1))


def _splits(
    items: Sequence[Item],
    labels: NDArray[np.int64],
    ties: NDArray[np.int64],
    test_fraction: float,
    val_fraction: float,
    val_as: str,
    seed: int,
) -> NDArray[np.int64]:
    """Give every image its split, a place in SPLITS: the one its folder names, else one drawn."""
    names = {item.split for item in items}
    if val_as == "test" and "test" in names:
        raise DataError("prepare.val_as: test, but there is a test folder already; use val")
    place = {"": 0, **{split: SPLITS.index(split) for split in SPLITS}}
    place["val"] = place[val_as]
    given = {place[name] for name in names}
    splits = np.fromiter((place[item.split] for item in items), np.int64)
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if SPLITS.index(split) in given or fraction == 0:
            continue
        train = np.flatnonzero(splits == 0)
        if len(np.unique(ties[train])) < 2:
            raise DataError(
                f"all training images are in one group, so no {split} split can be cut from them; "
                "set prepare.split_by: image, or give split folders"
            )
        chosen = draw(labels[train], ties[train], fraction, seed)
        splits[train[chosen]] = SPLITS.index(split)
    return splits


def _without_copies(splits: NDArray[np.int64], copies: NDArray[np.int64]) -> NDArray[np.int64]:
    """Take from given splits the files that a later one has too: -1 in place of their split.

    Drawn splits have none. Else train would hold the answers to validation and test.
    """
    last = np.zeros_like(copies)
    np.maximum.at(last, copies, splits)
    return np.where(splits == last[copies], splits, -1)


def _refuse_small(train: NDArray[np.int64], classes: Sequence[str], least: int) -> None:
    for name, n in zip(classes, np.bincount(train, minlength=len(classes)), strict=True):
        if n < least:
            raise DataError(
                f"class {name!r} has {n} training images and needs {least} "
                "(prepare.least_per_class); add some, or remove the class"
            )


def _write_index(
    file: Path,
    ids: NDArray[np.int64],
    items: Sequence[Item],
    splits: Sequence[str],
    groups: NDArray[np.int64],
    digests: NDArray[np.uint8],
) -> None:
    """Write index.csv: one row an image, in the order of `items`."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("id", "path", "label", "split", "group", "weight", "sha256"))
        columns = zip(ids, items, splits, groups, digests, strict=True)
        for i, item, split, group, digest in columns:
            if split:
                name = digest.tobytes().hex()
                writer.writerow((i, item.path, item.label, split, group, item.weight, name))


if __name__ == "__main__":
    main(prepare)
