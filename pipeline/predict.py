"""Predict: label and calibrated probability of new images, with the final model."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import classifier, portable
from pipeline.errors import DataError
from pipeline.images.decode import decode
from pipeline.nets.processor import set_up_torch
from pipeline.progress import say
from pipeline.stage import one_line_errors

NOT_SURE = "not sure"
Model = classifier.Classifier | portable.Portable


def load(file: Path) -> Model:
    """Read a final model, or what export made of it.

    Raises CheckpointError if the file is neither.
    """
    return portable.Portable(file) if file.suffix == ".onnx" else classifier.load(file)


def predict(model: Model, files: list[Path]) -> list[dict[str, Any]]:
    """Classify image files: a row each with its label, probability and whether that is sure.

    Raises DataError naming a file that isn't an image.
    """
    network = model.network
    pixels = [decode(f, network.packed_size, network.fit, network.channels) for f in files]
    rows = []
    for file, p in zip(files, model.probabilities(np.stack(pixels)), strict=True):
        rows.append(
            {
                "file": str(file),
                "label": network.classes[int(p.argmax())],
                "probability": round(float(p.max()), 4),
                "sure": bool(p.max() >= model.sure_above),
            }
        )
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict",
        description="Print the label and the calibrated probability of image files.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("models/final/model.safetensors"),
        help="a final model, or an export of it as ONNX (default: %(default)s)",
    )
    options = parser.parse_args()
    with one_line_errors():
        set_up_torch()
        for file in options.files:
            if not file.is_file():
                raise DataError(f"{file}: no such file")
        rows = predict(load(options.model), options.files)
    if options.json:
        json.dump(rows, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return
    for line in as_table(rows):
        say(line)


def as_table(rows: list[dict[str, Any]]) -> list[str]:
    """Align predictions in columns, whole however long a path is."""
    cells = [("file", "label", "probability")]
    for row in rows:
        label = row["label"] if row["sure"] else f"{row['label']} ({NOT_SURE})"
        cells.append((row["file"], label, f"{row['probability']:.3f}"))
    files, labels, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [f"{file:<{files}}  {label:<{labels}}  {p}" for file, label, p in cells]


if __name__ == "__main__":
    main()
