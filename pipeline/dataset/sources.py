"""Sources of images: a source lists images without decoding them."""

import hashlib
import importlib.metadata
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from pipeline.dataset import layout, table
from pipeline.dataset.fetch import fetched, unpacked
from pipeline.dataset.formats import SUFFIXES, suffix, what_else
from pipeline.dataset.layout import Item
from pipeline.stage_runtime.errors import DataError
from pipeline.stage_runtime.files import hash_of, walk

# A few GIFs among photographs are placeholders of web sites for lost ones: the ants and bees have
# one. Data sets of GIFs are read.
FEW_GIFS = 0.01
STRAY = "a GIF among other pictures, perhaps put in place of a lost one; convert it if it is meant"

# Neighbouring solar cells were cut from one module. The data set doesn't name the module; runs of
# one wafer type, cut every 60 rows, replace it (inferred from how similar neighbours are).
ELPV_ROWS_A_MODULE = 60

# The ants and bees of PyTorch's transfer-learning tutorial, and the SHA-256 over the names and the
# SHA-256 of its 397 photographs: the content of the archive matters, not how it was packed.
HYMENOPTERA_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
HYMENOPTERA_FILES = "41771d210287175073b7b183f7b57163e019b854f530d8edd91705379c9212ae"


@dataclass
class Source:
    """The images of a data set, and the files beside them that aren't images."""

    folder: Path
    items: list[Item]
    not_images: dict[str, str] = field(default_factory=dict)  # and what they are
    layout: list[str] = field(default_factory=list)  # how the folders were interpreted, in words
    gone: dict[str, str] = field(default_factory=dict)  # classes with a folder but no image


def elpv() -> Source:
    """List the 2,624 solar cells of the package `elpv-dataset`: functional or defective.

    A cell is defective above a probability p of 0.5. Its weight is max(p, 1 - p), the confidence of
    the raters. Source: Deitsch et al. 2019, arXiv 1807.02894.

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


def folder(path: Path, splits: str = layout.AUTO) -> Source:
    """List a folder of class sub-folders, with or without folders of splits above or below them.

    A folder below the class is a group of images that belong together. Hidden files are ignored;
    every other file that is not a still image is listed in `not_images`.

    Raises DataError if the folder is missing, empty, or has images outside any class folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set prepare.path to the folder of your images")
    tree = walk(path)
    # As strings, which take a tenth of the memory of paths; folder by folder.
    files = sorted(tree.files, key=lambda file: file.replace("/", "\0"))
    others = {f: what_else(path / f) for f in files if suffix(f) not in SUFFIXES}
    gifs = [file for file in files if suffix(file) == ".gif" and not others.get(file)]
    if len(gifs) < FEW_GIFS * len(files):
        others |= dict.fromkeys(gifs, STRAY)
    images = [file for file in files if not others.get(file)]
    not_images = {file: what for file, what in others.items() if what} | tree.odd
    if not images:
        first = next((f"{f} is {what}" for f, what in sorted(not_images.items())), "")
        raise DataError(
            f"{path}: no images here{f' ({first})' if first else ''}; expected {path}/CLASS/*.jpg "
            f"or {path}/train/CLASS/*.jpg"
        )
    found = layout.read(path, images, splits)
    said = found.said
    by_content = Counter(suffix(file) for file in images if file in others)
    if by_content:
        kinds = ", ".join(f"{n} {name or 'without a suffix'}" for name, n in by_content.items())
        said.append(f"pictures by their content: {kinds}")
    gone = {}
    folders = [*tree.empty, *(odd for odd in tree.odd if (path / odd).is_dir())]
    for label, inside in found.without([*not_images, *(f"{name}/" for name in folders)]):
        odd = [name for name in inside if name in not_images]
        held = f"{len(odd)} files, such as {odd[0]}: {not_images[odd[0]]}" if odd else ""
        first = inside[0].removesuffix("/")
        gone[label] = held or f"{first} is {tree.odd.get(first, 'empty')}"
    return Source(path, found.items, not_images, said, gone)


def csv(path: Path, file: str = "", columns: str = layout.AUTO) -> Source:
    """List the images that a table in a folder names: the only one there, or `file`.

    `columns` is the param: auto, or the names of the columns.

    Raises DataError if the folder is missing, or naming the line that can't be used.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; set prepare.path to the folder of your CSV file")
    items, said = table.items_of(path, file, columns)
    listed = {item.path for item in items}
    others = [f for f in walk(path).files if suffix(f) in SUFFIXES]
    if unlisted := sorted(file for file in others if file not in listed):
        said.append(f"in no line, so not used: {len(unlisted)} images ({unlisted[0]}, ...)")
    return Source(path, items, layout=said)


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
