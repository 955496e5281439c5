"""Where images come from: a source lists them, it decodes nothing."""

import csv
import hashlib
import importlib.metadata
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError, near
from pipeline.files import files_below, hash_of
from pipeline.images.fetch import fetched, is_within, unpacked
from pipeline.progress import say

# The still-image formats that torchvision's ImageFolder reads, so that counts agree with it.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
# The folders that are splits, by the names people give them.
SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

# Neighbouring solar cells were cut from one module. The data set doesn't name the module; runs of
# one wafer type, cut every 60 rows, stand in for it (an inference from how alike neighbours are).
ELPV_ROWS_A_MODULE = 60

# The ants and bees of PyTorch's transfer-learning tutorial, and the SHA-256 over the names and the
# SHA-256 of its 397 photographs: what the archive holds matters, not how it was packed.
HYMENOPTERA_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
HYMENOPTERA_FILES = "41771d210287175073b7b183f7b57163e019b854f530d8edd91705379c9212ae"


@dataclass(frozen=True, slots=True)
class Item:
    """One image: where it lies, what it shows, and what must stay together with it."""

    path: str  # relative to the source's folder, with forward slashes
    label: str
    split: str = ""  # empty: to be assigned
    group: str = ""  # empty: by its content
    weight: float = 1.0


@dataclass
class Source:
    """The images of a data set, and the files beside them that aren't images."""

    folder: Path
    items: list[Item]
    not_images: list[str] = field(default_factory=list)


def elpv() -> Source:
    """List the 2,624 solar cells of the package `elpv-dataset`: functional or defective.

    A cell is defective above a probability of 0.5, and weighs max(p, 1 - p): how sure the raters
    were. Source: Deitsch et al. 2019, arXiv 1807.02894.

    Raises DataError if the package isn't installed.
    """
    try:
        package = importlib.metadata.distribution("elpv-dataset")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            "prepare.source: elpv needs the package elpv-dataset; run `make install`"
        ) from None
    folder = Path(str(package.locate_file("elpv_dataset/data")))
    rows = [line.split() for line in (folder / "labels.csv").read_text("utf-8").splitlines()]
    items, modules = [], 0
    for wafer, run in groupby(rows, key=lambda row: row[2]):
        cells = list(run)
        in_run = max(1, round(len(cells) / ELPV_ROWS_A_MODULE))
        for i, (path, probability, _) in enumerate(cells):
            p = float(probability)
            module = modules + min(i // ELPV_ROWS_A_MODULE, in_run - 1)
            label = "defective" if p > 0.5 else "functional"
            items.append(Item(path, label, group=f"{wafer}-{module:02d}", weight=max(p, 1 - p)))
        modules += in_run
    return Source(folder, items)


def folder(path: Path) -> Source:
    """List a folder of class sub-folders, with or without train/val/test folders above them.

    A folder below the class names a group of images that belong together. Hidden files are passed
    over; every other file that isn't a still image by its suffix is listed in `not_images`.

    Raises DataError if the folder is missing, empty, or has images outside any class folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set prepare.path to the folder of your images")
    # As texts, of which a million take a tenth of the memory of paths; folder by folder.
    files = sorted((f.as_posix() for f in files_below(path)), key=lambda f: f.replace("/", "\0"))
    images = [file for file in files if _suffix(file) in SUFFIXES]
    not_images = [file for file in files if _suffix(file) not in SUFFIXES]
    if not images:
        raise DataError(
            f"{path}: no images here; expected {path}/CLASS/*.jpg or {path}/train/CLASS/*.jpg"
        )
    top = {file.partition("/")[0] for file in images if "/" in file}
    splits = {
        name: SPLIT_NAMES[name.lower()] for name in sorted(top) if name.lower() in SPLIT_NAMES
    }
    if splits and (others := sorted(top - set(splits))):
        raise DataError(f"{path}: {others[0]} lies beside {sorted(splits)[0]}; use splits or none")
    twice = [split for split, times in Counter(splits.values()).items() if times > 1]
    if twice:
        raise DataError(f"{path}: more than one folder for the {twice[0]} split; keep one")
    return Source(path, [_folder_item(path, file, splits) for file in images], not_images)


def table(path: Path) -> Source:
    """List the images that the one CSV file in a folder names, relative to that folder.

    Columns: path, label, and if given split (train, val, test or empty: to be cut from train),
    group (what must stay in one split) and weight (above 0). More columns are passed over.

    Raises DataError naming the line that can't be used.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set prepare.path to the folder of your CSV file")
    tables = sorted(path.glob("*.csv"))
    if len(tables) != 1:
        raise DataError(f"{path}: {len(tables)} CSV files here; prepare.source: csv needs one")
    file = tables[0]
    with file.open(newline="", encoding="utf-8-sig") as lines:
        try:
            reader = csv.DictReader(lines)
            columns = reader.fieldnames or []
            for needed in ("path", "label"):
                if needed not in columns:
                    raise DataError(f"{file}: no column {needed!r}; {near(needed, columns)}")
            items = [_table_item(path, f"{file}:{reader.line_num}", row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file}: can't be read as UTF-8 CSV ({error})") from None
    if not items:
        raise DataError(f"{file}: lists no images")
    twice = [name for name, times in Counter(item.path for item in items).items() if times > 1]
    if twice:
        raise DataError(f"{file}: lists {twice[0]} more than once; keep one line of it")
    listed = {item.path for item in items}
    others = [f for f in files_below(path) if f.suffix.lower() in SUFFIXES]
    if unlisted := sorted(f.as_posix() for f in others if f.as_posix() not in listed):
        say(f"not in {file.name}, so not used: {len(unlisted)} images ({unlisted[0]}, ...)")
    return Source(path, items)


def _table_item(path: Path, where: str, row: dict[str, str]) -> Item:
    """Check one line of a CSV file; `where` names it in errors."""
    name = PurePosixPath((row["path"] or "").strip().replace("\\", "/"))
    if not name.parts or not is_within(name):
        raise DataError(f"{where}: path {row['path']!r} isn't relative to {path} and within it")
    if not (path / name).is_file():
        raise DataError(f"{where}: no file {path / name}")
    label = (row["label"] or "").strip()
    if not label:
        raise DataError(f"{where}: {name} has no label")
    split = (row.get("split") or "").strip().lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{where}: split {split!r}; {near(split, SPLIT_NAMES)}")
    said = (row.get("weight") or "").strip() or "1"
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{where}: weight {said!r} is no number above 0")
    group = (row.get("group") or "").strip()
    return Item(name.as_posix(), label, SPLIT_NAMES.get(split, ""), group, weight)


def hymenoptera(path: Path) -> Source:
    """List the ants and bees of PyTorch's tutorial: a copy at `path`, else fetched and checked.

    The tutorial's 153 validation images are a given `val` folder.

    Raises DataError if they can't be fetched, or aren't those of the tutorial.
    """
    if not (path / "train" / "ants").is_dir():
        path = unpacked(fetched(HYMENOPTERA_URL))
    found = folder(path)
    names = sorted(item.path for item in found.items)
    lines = "".join(f"{name} {hash_of(path / name)}\n" for name in names)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    if digest != HYMENOPTERA_FILES:
        raise DataError(
            f"{path}: not the 397 photographs of the tutorial, but {len(names)} with {digest}; "
            "use prepare.source: folder for a set of your own"
        )
    return found


def _folder_item(path: Path, file: str, splits: dict[str, str]) -> Item:
    *above, _ = file.split("/")
    split = splits.get(above[0], "") if above else ""
    below = above[1:] if split else above
    if not below:
        raise DataError(f"{path / file}: lies in no class folder; move it into one")
    group = "/".join(below) if len(below) > 1 else ""
    return Item(file, sys.intern(below[0]), split, group)


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()
