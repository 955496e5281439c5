"""Estimate the time and memory for many images from the rates of the last run here.

    dvc repro && python -m bench.paper
    python -m bench.paper --images 1.3e6 14e6 1e9
    python -m bench.paper --hashes 2000      # a quick look

Times are for this machine, with the params and the split fractions of that run; other machines are
not estimated. The search for near duplicates is timed on random hashes, and grows with the square
of their number.
"""

import argparse
import csv
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.commands.table import aligned
from pipeline.dataset.near_duplicates import near_duplicates
from pipeline.stage_runtime.progress import duration, say
from pipeline.training.schedule import epochs_of

# Bytes of memory per image while prepare lists and splits images (bench/large.py), ungrouped and in
# many groups.
LISTED, GROUPED = 524, 749


class Blank:
    """Identical blank images. They are never compared, as no two hashes are close."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.zeros((len(rows), 32, 32), np.uint8)


def main() -> None:
    """Print one column per number of images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--images", type=float, nargs="+", default=[1.3e6, 14e6, 1e9])
    parser.add_argument("--root", type=Path, default=Path(), help="where the run is")
    parser.add_argument(
        "--hashes", type=int, default=200_000, help="how many are drawn, to time the search"
    )
    options = parser.parse_args()
    hashes = np.random.default_rng(0).integers(0, 2**63, options.hashes, dtype=np.uint64)
    start = time.perf_counter()
    near_duplicates(Blank(len(hashes)), hashes)
    search = (time.perf_counter() - start) / len(hashes) ** 2
    columns = [costs(options.root, int(n), search) for n in options.images]
    rows = [["", *(f"{int(n):,} images" for n in options.images)]]
    rows += [[what, *(column[what] for column in columns)] for what in columns[0]]
    for line in aligned(rows):
        say(line)


def costs(root: Path, n: int, search: float) -> dict[str, str]:
    """Return the time or memory of n images for each step."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    timings: dict[str, dict[str, float]] = {}
    for file in root.glob("models/*/timing.json"):
        timings |= json.loads(file.read_text())
    with (root / "data/prepared/index.csv").open() as lines:
        counts = Counter(row["split"] for row in csv.DictReader(lines))
    here = sum(counts.values())
    train, others = (counts["train"] * n / here, (counts["val"] + counts["test"]) * n / here)
    val = counts["val"] * n / here
    one, two = params["stage1"], params["stage2"]
    trunk = timings["stage1"]["trunk_seconds"] / (one["views"] * counts["train"] + counts["val"])
    trained = counts["train"] + counts["val"]
    top, step = (
        timings[name]["epochs_seconds"] / epochs(params[name], counts["train"]) / trained
        for name in ("stage1", "stage2")
    )
    first, second = (epochs(of_stage, int(train)) for of_stage in (one, two))
    # As advise timed it: with few images, most of evaluate's time is start-up.
    tested = timings["advise"]["evaluate_expected_seconds"] / (counts["val"] + counts["test"])
    packed, codes = (bytes_below(root / "data" / f) for f in ("prepared/images", "features"))
    anew = first * (train * (trunk + top) + val * top) + val * trunk
    return {
        "prepare: decode and pack": long(n / timings["prepare"]["images_per_second"]),
        "prepare: search for near duplicates": long(search * n**2),
        "prepare: memory": size(LISTED * n),
        "prepare: memory, in groups of four": size(GROUPED * n),
        f"packed, {params['prepare']['storage']}": size(packed * n / here),
        "extract": long(n / timings["extract"]["images_per_second"]),
        "codes": size(codes * n / here),
        f"stage 1, {first} epochs, trunk run anew in each": long(anew),
        f"stage 2, {second} epochs": long(second * (train + val) * step),
        "evaluate": long(others * tested),
    }


def epochs(of_stage: dict[str, Any], images: int) -> int:
    """Return the number of a stage's epochs on so many training images."""
    return epochs_of(of_stage["epochs"], images, of_stage["batch_size"])


def long(seconds: float) -> str:
    """Format a time, which may be years."""
    days = seconds / 86_400
    if days < 2:
        return duration(seconds)
    return f"{days:.0f} days" if days < 730 else f"{days / 365:.0f} years"


def bytes_below(folder: Path) -> int:
    """Add up the sizes of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size(n_bytes: float) -> str:
    """Format a number of bytes."""
    for unit in ("MB", "GB", "TB"):
        n_bytes /= 1e3 if unit != "MB" else 1e6
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
    return f"{n_bytes:.0f} TB"


if __name__ == "__main__":
    main()
