"""Prepare: list, audit and split the images of a source; decode each once; pack as uint8."""

import csv
import shutil
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Interval
from numpy.typing import NDArray

from pipeline.dataset import audit, sources
from pipeline.dataset.audit_summary import summary
from pipeline.dataset.fetch import images_at
from pipeline.dataset.layout import Item
from pipeline.dataset.near_duplicates import clusters
from pipeline.dataset.pack import Survey, pack, survey
from pipeline.dataset.sources import Source
from pipeline.dataset.split import draw, fold, linked_groups, numbered
from pipeline.dataset.table import is_table
from pipeline.dataset.torchvision_sets import published
from pipeline.images.shards import SPLITS, Facts, Fit, Images, Storage
from pipeline.images.tones import AUTO, Background, Tones, background_of, given_range, range_of
from pipeline.stage_runtime.errors import DataError, ParamError, suggest
from pipeline.stage_runtime.files import is_formula, path_cell, shown, whole_folder, write_json
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import READS, Key, Out, Seed

TORCHVISION = "torchvision/"
MOST_FOLDS = 100
# The sources that read a param.
READ_BY = {
    "url": ("folder", "csv"),
    "splits": ("folder",),
    "table": ("csv",),
    "columns": ("csv",),
}

Fraction = Annotated[float, Interval(ge=0, lt=1)]


def prepare(
    *,
    out: Out,
    source: str,
    path: Annotated[str, READS],
    url: str,
    sha256: str,
    splits: str,
    table: str,
    columns: str,
    not_images: Literal["refuse", "skip"],
    size: Annotated[int, Interval(ge=16, le=2048)],
    fit: Fit,
    value_range: Annotated[str, Key("prepare.range")],
    background: Literal["auto", "white", "black", "grey"],
    storage: Storage,
    split_by: Literal["group", "image"],
    test_fraction: Fraction,
    test_fold: str,
    val_fraction: Annotated[float, Interval(gt=0, lt=1)],
    val_as: Literal["val", "test"],
    least_per_class: Annotated[int, Ge(2)],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Decode every image once, audit and split the set, and pack it as square uint8 arrays.

    Writes index.csv, facts.json, audit.json and images/, the shards of all splits, to `out`.

    Raises DataError naming the file or the class if the data set can't be used.
    """
    folds = _folds(test_fold)
    _say_unused(source, {"url": url, "splits": splits, "table": table, "columns": columns})
    found = _source(source, Path(path), url, sha256, splits, table, columns)
    _refuse_not_images(found, not_images)
    classes = sorted({item.label for item in found.items})
    if len(classes) < 2:
        raise DataError(f"{found.folder}: only one class ({classes}); at least two are needed")
    _refuse_names(found, classes)
    with whole_folder(out) as folder:
        surveyed = survey(found)
        unreadable = surveyed.unreadable
        tones = _tones(found, surveyed, given_range(value_range), background)
        facts = Facts(classes, size, fit, 1 if surveyed.is_grey else 3, storage, "", tones)
        start = time.perf_counter()
        packed = pack(resume, found, facts, unreadable, folder)
        rate = packed.decoded / (time.perf_counter() - start)
        if unreadable and not_images == "refuse":
            raise DataError(
                f"{unreadable[min(unreadable)]}; move it away, or set prepare.not_images: skip"
            )
        ids = np.flatnonzero(packed.read)
        items = [found.items[i] for i in ids]
        facts = replace(facts, pixels=packed.pixels)
        alike = clusters(Images(folder, facts, ids), packed.hashes[ids])
        digests = packed.digests[ids]
        copies = np.unique(digests.view("V32")[:, 0], return_inverse=True)[1]
        number = {name: i for i, name in enumerate(classes)}
        labels = np.fromiter((number[item.label] for item in items), np.int64)
        ties = _ties(items, copies, alike, split_by)
        shares = {"test": test_fraction, "val": val_fraction}
        drawn = _splits(items, labels, ties, shares, folds, val_as, seed)
        drawn = _without_copies(drawn, copies)
        _refuse_small(labels[drawn == 0], classes, least_per_class)

        if surveyed.is_deep and value_range == AUTO:
            # The splits depend on what images show; the range depends on training images only.
            seen = [surveyed.seen[i] for i in ids[drawn == 0].tolist() if i in surveyed.seen]
            low, high = range_of(seen)
            of_train = replace(tones, low=low, high=high)
            if of_train != tones:
                facts = replace(facts, tones=of_train)
                shutil.rmtree(folder / "images")
                packed = pack(resume, found, facts, unreadable, folder)
                facts = replace(facts, pixels=packed.pixels)
        names = [SPLITS[split] if split >= 0 else "" for split in drawn]
        # The audit must not depend on where the images are stored.
        reasons = {p: said.replace(f"{found.folder}/", "") for p, said in unreadable.items()}
        report = audit.report(
            found,
            items,
            names,
            copies,
            alike,
            audit.looks(found, surveyed, packed, ids, names, facts),
            reasons,
        )
        write_json(folder / "audit.json", report)
        write_json(folder / "facts.json", facts.to_json())
        _write_index(folder / "index.csv", ids, items, names, ties, digests)
    for line in summary(report):
        say(line)
    return {"images_per_second": rate} if packed.decoded else {}


def _source(
    name: str, path: Path, url: str, sha256: str, splits: str, table: str, columns: str
) -> Source:
    """List the images of the source that params.yaml names."""
    if name.startswith(TORCHVISION):
        return sources.folder(published(name.removeprefix(TORCHVISION), path))
    known: dict[str, Callable[[], Source]] = {
        "elpv": sources.elpv,
        "hymenoptera": lambda: sources.hymenoptera(path),
        "folder": lambda: sources.folder(images_at(path, url, sha256), splits),
        "csv": lambda: sources.csv(images_at(path, url, sha256), table, columns),
    }
    if name not in known:
        hint = suggest(name, [*known, f"{TORCHVISION}CIFAR10"])
        raise ParamError(f"params.yaml: prepare.source = {name!r}: {hint}")
    return known[name]()


def _say_unused(source: str, given: Mapping[str, str]) -> None:
    """Print which params are set though this source doesn't read them."""
    for name, value in given.items():
        if value not in ("", "auto") and source not in READ_BY[name]:
            others = " or ".join(READ_BY[name])
            say(f"prepare.{name}: {value} is not used by source: {source}, only by {others}")


def _refuse_not_images(found: Source, not_images: Literal["refuse", "skip"]) -> None:
    """Raise DataError for files that aren't images and classes without one, unless skipped."""
    for label, held in found.gone.items():
        if not_images == "refuse":
            raise DataError(
                f"{found.folder}: no image of class {label!r} ({held}); add some, remove its "
                "folder, or set prepare.not_images: skip"
            )
        found.layout.append(f"no class {label!r}, as its folder holds no image ({held})")
    if found.not_images and not_images == "refuse":
        first, what = min(found.not_images.items())
        table = ", or prepare.source: csv if it lists the images" if is_table(first) else ""
        raise DataError(
            f"{found.folder / first}: {what} ({len(found.not_images)} such files); move it away, "
            f"or set prepare.not_images: skip{table}"
        )


def _tones(
    found: Source,
    surveyed: Survey,
    given: tuple[float, float] | None,
    background: Background | Literal["auto"],
) -> Tones:
    """Choose the conversion to 8 bits, from all images not given to validation or test."""
    seen = [s for i, s in surveyed.seen.items() if found.items[i].split in ("", "train")]
    low, high = given or range_of(seen) if surveyed.is_deep else (None, None)
    if given and not surveyed.is_deep:
        raise ParamError(
            "params.yaml: prepare.range is for images with more than 8 bits per value, and these"
            " have 8; set it to auto"
        )
    return Tones(low, high, background_of(seen) if background == "auto" else background)


def _refuse_names(found: Source, classes: Sequence[str]) -> None:
    """Refuse names that could do harm in index.csv and predictions.csv."""
    _refuse_alike(found, classes)
    named = chain((("class", c) for c in classes), (("path", item.path) for item in found.items))
    for what, name in named:
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
            cs = "bytes that are not UTF-8" if shown(name) != name else "control characters"
            raise DataError(f"{what} {shown(name)!r} contains {cs}; rename it")
        if is_formula(name.partition("/")[0]):  # a class may be called -1
            raise DataError(
                f"{what} {name!r} begins with {name[0]!r}, like a spreadsheet formula; rename it"
            )


def _refuse_alike(found: Source, classes: Sequence[str]) -> None:
    """Refuse class names that differ only by case, blanks or Unicode form."""
    plain: dict[str, str] = {}
    for name in classes:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        other = plain.setdefault(key, name)
        if other != name:
            raise DataError(
                f"{found.folder}: the classes {other!a} and {name!a} differ only by case,"
                " blanks or Unicode form; give them one name, or names that differ more"
            )


def _ties(
    items: Sequence[Item],
    copies: NDArray[np.int64],
    alike: NDArray[np.int64],
    split_by: Literal["group", "image"],
) -> NDArray[np.int64]:
    """Number the sets of images that must stay in one split.

    Equal files always stay together; with split_by: group, the images of a group do too. An image
    without a group belongs to the group of its near duplicates.
    """
    if split_by == "image":
        return linked_groups(copies)
    groups = numbered(item.group for item in items)
    return linked_groups(copies, groups, np.where(groups < 0, alike, -1))


def _splits(
    items: Sequence[Item],
    labels: NDArray[np.int64],
    ties: NDArray[np.int64],
    shares: Mapping[str, float],
    folds: tuple[int, int] | None,
    val_as: str,
    seed: int,
) -> NDArray[np.int64]:
    """Return each image's split, an index into SPLITS: named by its folder, or else drawn.

    With `folds`, the test split is the first number's part of the second number's parts.
    """
    names = {item.split for item in items}
    if val_as == "test" and "test" in names:
        raise DataError("prepare.val_as: test, but there is a test folder already; use val")
    place = {"": 0, **{split: SPLITS.index(split) for split in SPLITS}}
    place["val"] = place[val_as]
    given = {place[name] for name in names}
    splits = np.fromiter((place[item.split] for item in items), np.int64)
    if folds and SPLITS.index("test") in given:
        raise DataError(
            "prepare.test_fold is set, but the images have a test split already; leave it empty, "
            "or set prepare.splits: none"
        )
    for split, fraction in shares.items():
        in_folds = folds if split == "test" else None
        if SPLITS.index(split) in given or (fraction == 0 and not in_folds):
            continue
        train = np.flatnonzero(splits == 0)
        if len(np.unique(ties[train])) < 2:
            raise DataError(
                f"all training images are in one group, so no {split} split can be cut from them; "
                "set prepare.split_by: image, or give split folders"
            )
        if in_folds:
            chosen = _one_fold(labels[train], ties[train], *in_folds, seed)
        else:
            chosen = draw(labels[train], ties[train], fraction, seed)
        splits[train[chosen]] = SPLITS.index(split)
    return splits


def _folds(text: str) -> tuple[int, int] | None:
    """Read prepare.test_fold, such as 3/10; None if it is off.

    Raises ParamError if it is anything else.
    """
    if not text:
        return None
    number, slash, folds = text.partition("/")
    numbers = (number, folds) if slash and number.isdecimal() and folds.isdecimal() else ("0", "0")
    first, last = (int(part) for part in numbers)
    if not 1 <= first <= last or not 2 <= last <= MOST_FOLDS:
        raise ParamError(
            f"params.yaml: prepare.test_fold = {text!r}: expected a fold and the number of folds, "
            f"such as 3/10, with at most {MOST_FOLDS} folds; or nothing"
        )
    return first, last


def _one_fold(
    labels: NDArray[np.int64], ties: NDArray[np.int64], number: int, folds: int, seed: int
) -> NDArray[np.bool_]:
    """Return the mask (N,) of a fold; raises DataError if there are too few images for as many."""
    try:
        return fold(labels, ties, number, folds, seed)
    except ValueError:
        groups, most = len(np.unique(ties)), int(np.bincount(labels).max())
        raise DataError(
            f"prepare.test_fold: {groups} groups of images, and at most {most} images of a class, "
            f"are too few for {folds} folds; use fewer"
        ) from None


def _without_copies(splits: NDArray[np.int64], copies: NDArray[np.int64]) -> NDArray[np.int64]:
    """Remove files from given splits if a later split has them too: their split becomes -1.

    Otherwise train could contain images of validation or test. Drawn splits have no such files.
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
    """Write index.csv: one row per image, in the order of `items`."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("id", "path", "label", "split", "group", "weight", "sha256"))
        columns = zip(ids, items, splits, groups, digests, strict=True)
        for i, item, split, group, digest in columns:
            if split:
                name = digest.tobytes().hex()
                writer.writerow(
                    (i, path_cell(item.path), item.label, split, group, item.weight, name)
                )
