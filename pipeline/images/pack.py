"""The packed images: one memory-mapped uint8 array a split, and the index that names its rows."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import reading

Fit = Literal["squash", "crop", "pad"]  # how an image becomes a square
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Facts:
    """What later stages must know of the packed images, written once by prepare."""

    classes: list[str]
    size: int  # pixels a side
    fit: Fit
    channels: int  # 1 for grey, else 3


@dataclass(frozen=True)
class Rows:
    """The labelled rows of one split, in the order of its packed array; each array is (N,)."""

    ids: NDArray[np.int64]
    paths: list[str]
    labels: NDArray[np.int64]  # positions in Facts.classes
    groups: NDArray[np.int64]
    weights: NDArray[np.float64]


def read_facts(prepared: Path) -> Facts:
    """Read what prepare wrote about its packed images.

    Raises DataError if prepare didn't run, or the file is damaged.
    """
    file = prepared / "facts.json"
    with reading(file, "prepare"):
        facts = Facts(**json.loads(file.read_text(encoding="utf-8")))
        if len(facts.classes) < 2 or facts.size < 1 or facts.channels not in (1, 3):
            raise ValueError(f"{facts}")
    return facts


def read_rows(prepared: Path, split: str) -> Rows:
    """Read one split of index.csv, labels included; only evaluate may read those of test.

    Raises DataError if a label is none of the classes, or the file is damaged.
    """
    classes = {name: i for i, name in enumerate(read_facts(prepared).classes)}
    index = prepared / "index.csv"
    with reading(index, "prepare"):
        with index.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == split]
        for row in rows:
            if row["label"] not in classes:
                raise DataError(f"{index}: row {row['id']} has the unknown label {row['label']!r}")
        return Rows(
            np.array([int(row["id"]) for row in rows], np.int64),
            [row["path"] for row in rows],
            np.array([classes[row["label"]] for row in rows], np.int64),
            np.array([int(row["group"]) for row in rows], np.int64),
            np.array([float(row["weight"]) for row in rows]),
        )


def read_images(prepared: Path, split: str) -> NDArray[np.uint8]:
    """Memory-map a split's images, (N, H, W) for grey ones, else (N, H, W, 3).

    Raises DataError if they aren't there, or aren't such an array.
    """
    facts, file = read_facts(prepared), prepared / f"{split}.npy"
    with reading(file, "prepare"):
        images: NDArray[np.uint8] = np.load(file, mmap_mode="r")
        shape = (facts.size, facts.size) if facts.channels == 1 else (facts.size, facts.size, 3)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(f"{images.dtype} of shape {images.shape}")
    return images
