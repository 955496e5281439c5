"""The features folder: one memory-mapped array of codes per split and depth, and the labels."""

import csv
import json
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.rows import Rows
from pipeline.stage_runtime.files import reading

LAST = "last"  # the head's input, from which stage 1's head starts
SOURCE = "source"  # the head's output: the logits of the classes that the weights were trained on
JOIN = "+"  # between depths whose codes are concatenated; no module's name contains it

# NumPy parses an array's header with `ast`, which Python 3.11 can't do in two threads at once
# (github.com/python/cpython/issues/106905).
HEADERS = Lock()


def codes_name(split: str, depth: str) -> str:
    """Return the name of the array of codes (N, D) of one split and depth."""
    return f"{split}-{depth}"


def read_codes(features: Path, split: str, depth: str) -> NDArray[np.float32]:
    """Memory-map the codes (N, D) of one split and depth, or concatenate several depths."""
    with HEADERS:
        parts: list[NDArray[np.float32]] = [
            np.load(features / f"{codes_name(split, part)}.npy", mmap_mode="r")
            for part in depth.split(JOIN)
        ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def read_feature_facts(features: Path) -> dict[str, Any]:
    """Read how the codes were computed: the network's facts and the depths.

    Raises DataError if extract hasn't run, or the file is damaged.
    """
    file = features / "facts.json"
    with reading(file, "extract"):
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"depths", "classes", "backbone", "viewing"} - set(facts):
            raise ValueError(f"no {sorted(missing)}")
    return facts


def write_labels(file: Path, splits: dict[str, Rows]) -> None:
    """Write the labels of the given splits, so that readers of codes don't need the images."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("split", "id", "path", "label", "group", "weight"))
        for split, rows in splits.items():
            columns = zip(rows.ids, rows.paths, rows.labels, rows.groups, rows.weights, strict=True)
            for number, path, *values in columns:
                writer.writerow((split, number, path, *(value.item() for value in values)))


def read_labels(features: Path, split: str) -> Rows:
    """Read the labels of train or val, in the order of their codes.

    Raises DataError if the file is damaged.
    """
    file = features / "labels.csv"
    with reading(file, "extract"):
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.DictReader(lines) if row["split"] == split]
        return Rows(
            np.array([int(row["id"]) for row in rows], np.int64),
            [row["path"] for row in rows],
            np.array([int(row["label"]) for row in rows], np.int64),
            np.array([int(row["group"]) for row in rows], np.int64),
            np.array([float(row["weight"]) for row in rows]),
        )
