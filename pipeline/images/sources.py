"""Where images come from: a source lists them, it decodes nothing."""

import importlib.metadata
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipeline.errors import DataError

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


@dataclass(frozen=True)
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
    files = sorted(_files(path))
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    not_images = [file.as_posix() for file in files if file.suffix.lower() not in SUFFIXES]
    if not images:
        raise DataError(
            f"{path}: no images here; expected {path}/CLASS/*.jpg or {path}/train/CLASS/*.jpg"
        )
    top = {file.parts[0] for file in images if len(file.parts) > 1}
    splits = {name: SPLIT_NAMES[name.lower()] for name in top if name.lower() in SPLIT_NAMES}
    if splits and (others := sorted(top - set(splits))):
        raise DataError(f"{path}: {others[0]} lies beside {sorted(splits)[0]}; use splits or none")
    twice = [split for split, times in Counter(splits.values()).items() if times > 1]
    if twice:
        raise DataError(f"{path}: more than one folder for the {twice[0]} split; keep one")
    return Source(path, [_folder_item(path, file, splits) for file in images], not_images)


def _files(path: Path) -> Iterator[Path]:
    """Find all files below a folder, through linked folders too, each folder once."""
    seen = set()
    for here, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (
            Path(here, name).relative_to(path) for name in names if not name.startswith(".")
        )


def _folder_item(path: Path, file: Path, splits: dict[str, str]) -> Item:
    split = splits.get(file.parts[0], "")
    below = file.parts[1:] if split else file.parts
    if len(below) < 2:
        raise DataError(f"{path / file}: lies in no class folder; move it into one")
    group = "/".join(below[:-1]) if len(below) > 2 else ""
    return Item(file.as_posix(), below[0], split, group)
