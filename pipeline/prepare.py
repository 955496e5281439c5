"""Prepare: list the images of a source, audit, split, decode each once, pack as uint8."""

import csv
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Ge, Interval
from numpy.typing import NDArray

from pipeline.errors import DataError, ParamError, near
from pipeline.files import link, new_array, whole_folder, write_json
from pipeline.images import audit, sources
from pipeline.images.alike import clusters_alike
from pipeline.images.decode import Header, Pixels, decode, header
from pipeline.images.fetch import hash_of, images_at
from pipeline.images.findings import summary
from pipeline.images.pack import SPLITS, Facts, Fit
from pipeline.images.published import published
from pipeline.images.sources import Item, Source
from pipeline.images.split import draw, together
from pipeline.progress import say, track
from pipeline.resume import Resume
from pipeline.runtime import threads
from pipeline.stage import READS, Out, Seed, main

TORCHVISION = "torchvision/"
AT_ONCE = 512  # images that threads are given to work on
PACKED = 64  # images copied into a split's array

T = TypeVar("T")
Fraction = Annotated[float, Interval(ge=0, lt=1)]


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
    split_by: Literal["group", "image"],
    test_fraction: Fraction,
    val_fraction: Annotated[float, Interval(gt=0, lt=1)],
    val_as: Literal["val", "test"],
    least_per_class: Annotated[int, Ge(2)],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Decode every image once, audit and split the set, and pack it as square uint8 arrays.

    Writes index.csv, facts.json, audit.json and one {split}.npy a split into `out`.

    Raises DataError for a set that can't be used, naming the file or the class.
    """
    found = _source(source, Path(path), url, sha256)
    if found.not_images and not_images == "refuse":
        raise DataError(
            f"{found.folder / found.not_images[0]}: not an image ({len(found.not_images)} such "
            "files); move it away, or set prepare.not_images: skip"
        )
    _refuse_names(found)
    with whole_folder(out) as folder:
        headers, unreadable = _headers(found)
        channels = 1 if all(one.grey for one in headers) else 3
        start = time.perf_counter()
        pixels, digests, decoded = _decode_all(resume, found, size, fit, channels, unreadable)
        rate = decoded / (time.perf_counter() - start)
        if unreadable and not_images == "refuse":
            raise DataError(
                f"{next(iter(unreadable.values()))}; move it away, or set prepare.not_images: skip"
            )
        kept = [i for i, item in enumerate(found.items) if item.path not in unreadable]
        items, digests = [found.items[i] for i in kept], [digests[i] for i in kept]
        classes = sorted({item.label for item in found.items})
        if len(classes) < 2:
            raise DataError(f"{found.folder}: one class only ({classes}); two or more are needed")
        alike = clusters_alike(pixels)
        alike = [alike[i] for i in kept]
        ties = _ties(items, digests, alike, split_by)
        splits = _splits(items, ties, test_fraction, val_fraction, val_as, seed)
        splits = _without_copies(splits, digests)
        labels = np.array([classes.index(item.label) for item in items])
        _refuse_small(labels[np.array(splits) == "train"], classes, least_per_class)

        sides = audit.sides([one.short for one in headers], [one.long for one in headers], size)
        report = audit.report(items, splits, digests, alike, sides, found.not_images, unreadable)
        write_json(folder / "audit.json", report)
        write_json(folder / "facts.json", asdict(Facts(classes, size, fit, channels)))
        _write_index(folder / "index.csv", items, splits, ties, digests)
        for split in SPLITS:
            of_split = [row for row, s in zip(kept, splits, strict=True) if s == split]
            _pack(resume, pixels, np.array(of_split, np.int64), folder / f"{split}.npy")
    for line in summary(report):
        say(line)
    return {"images_per_second": rate} if decoded else {}


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


def _refuse_names(found: Source) -> None:
    """Refuse names that would do harm where index.csv and predictions.csv are read."""
    classes = sorted({item.label for item in found.items})
    named = [("class", name) for name in classes] + [("path", item.path) for item in found.items]
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


def _headers(found: Source) -> tuple[list[Header], dict[str, str]]:
    """Read every header that can be read, and list the files where it can't."""

    def look(item: Item) -> Header | DataError:
        try:
            return header(found.folder / item.path)
        except DataError as error:
            return error

    seen = list(_in_threads(look, found.items))
    headers = [one for one in seen if isinstance(one, Header)]
    pairs = zip(found.items, seen, strict=True)
    return headers, {item.path: str(one) for item, one in pairs if isinstance(one, DataError)}


def _decode_all(
    resume: Resume,
    found: Source,
    size: int,
    fit: Fit,
    channels: int,
    unreadable: dict[str, str],
) -> tuple[Pixels, list[str], int]:
    """Read, hash and decode every file, in threads (Pillow lets go of the interpreter).

    Returns the pixels on disk, a row an item, the hashes, and how many it did, beside those that an
    earlier run had done; adds to `unreadable`.
    """
    n, begun = len(found.items), 0
    none = np.zeros((size, size) if channels == 1 else (size, size, channels), np.uint8)

    def one(item: Item) -> Sequence[NDArray[Any]]:
        file, digest = found.folder / item.path, bytes(32)
        try:
            digest = bytes.fromhex(hash_of(file))
            if item.path not in unreadable:
                return _row(decode(file, size, fit, channels), digest, True)
        except OSError as error:
            unreadable[item.path] = f"{file}: can't be read ({error.strerror})"
        except DataError as error:
            unreadable[item.path] = str(error)
        return _row(none, digest, False)

    def rows(first: int) -> Iterator[Sequence[NDArray[Any]]]:
        nonlocal begun
        begun = first
        return track(_in_threads(one, found.items[first:]), n - first, "decode")

    pixels, digests, read = resume.filled(["pixels", "digests", "read"], n, rows)
    for i in np.flatnonzero(~read):
        if found.items[i].path not in unreadable:
            one(found.items[i])  # an earlier run's: once more for the reason
    return pixels, [row.tobytes().hex() for row in digests], n - begun


def _in_threads(work: Callable[[Item], T], items: Sequence[Item]) -> Iterator[T]:
    """Work on items in threads, in their order; some at a time, as each waits in memory."""
    with ThreadPoolExecutor(threads()) as pool:
        for start in range(0, len(items), AT_ONCE):
            yield from pool.map(work, items[start : start + AT_ONCE])


def _row(pixels: Pixels, digest: bytes, read: bool) -> Sequence[NDArray[Any]]:
    return pixels[None], np.frombuffer(digest, np.uint8)[None], np.array([read])


def _pack(resume: Resume, pixels: Pixels, rows: NDArray[np.int64], file: Path) -> None:
    """Write some rows of the pixels as an array of their own."""

    def packed(first: int) -> Iterator[Sequence[Pixels]]:
        return ([pixels[rows[i : i + PACKED]]] for i in range(first, len(rows), PACKED))

    if resume.filled([file.stem], len(rows), packed):
        link(resume.file(file.stem), file)
    else:
        new_array(file, np.uint8, (0, *pixels.shape[1:]))


def _ties(
    items: Sequence[Item], digests: Sequence[str], alike: Sequence[str], split_by: str
) -> list[int]:
    """Number what must stay in one split: equal files always, and if asked for a group.

    An image without a group of its own is in that of its near duplicates.
    """
    if split_by == "image":
        return together(digests)
    groups = [item.group for item in items]
    near = [a if not group else "" for a, group in zip(alike, groups, strict=True)]
    return together(digests, groups, near)


def _splits(
    items: Sequence[Item],
    groups: Sequence[int],
    test_fraction: float,
    val_fraction: float,
    val_as: str,
    seed: int,
) -> list[str]:
    """Give every image its split: the one its folder names, else one drawn."""
    given = [val_as if item.split == "val" else item.split for item in items]
    if val_as == "test" and "test" in {item.split for item in items}:
        raise DataError("prepare.val_as: test, but there is a test folder already; use val")
    splits = np.array([split or "train" for split in given], dtype="<U5")
    _, labels = np.unique([item.label for item in items], return_inverse=True)
    ties = np.array(groups).astype(str)
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split in given or fraction == 0:
            continue
        train = np.flatnonzero(splits == "train")
        if len(set(ties[train])) < 2:
            raise DataError(
                f"all training images are in one group, so no {split} split can be cut from them; "
                "set prepare.split_by: image, or give split folders"
            )
        chosen = draw(labels[train], ties[train].tolist(), fraction, seed)
        splits[train[chosen]] = split
    return [str(split) for split in splits]


def _without_copies(splits: Sequence[str], digests: Sequence[str]) -> list[str]:
    """Take from given splits the files that a later one has too: "" in place of their split.

    Drawn splits have none. Else train would hold the answers to validation and test.
    """
    last: dict[str, int] = {}
    for split, digest in zip(splits, digests, strict=True):
        last[digest] = max(last.get(digest, 0), SPLITS.index(split))
    return [
        split if SPLITS.index(split) == last[digest] else ""
        for split, digest in zip(splits, digests, strict=True)
    ]


def _refuse_small(train: NDArray[np.int64], classes: Sequence[str], least: int) -> None:
    for name, n in zip(classes, np.bincount(train, minlength=len(classes)), strict=True):
        if n < least:
            raise DataError(
                f"class {name!r} has {n} training images and needs {least} "
                "(prepare.least_per_class); add some, or remove the class"
            )


def _write_index(
    file: Path,
    items: Sequence[Item],
    splits: Sequence[str],
    groups: Sequence[int],
    digests: Sequence[str],
) -> None:
    """Write index.csv: one row an image, in the order of `items`."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("id", "path", "label", "split", "group", "weight", "sha256"))
        columns = zip(items, splits, groups, digests, strict=True)
        for i, (item, split, group, digest) in enumerate(columns):
            if split:
                writer.writerow((i, item.path, item.label, split, group, item.weight, digest))


if __name__ == "__main__":
    main(prepare)
