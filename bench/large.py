r"""Run prepare and extract on many images: rates, memory, and a kill in the middle of each.

    python -m bench.large                                # 20,000 and 200,000 images of 64 pixels
    python -m bench.large --images 2000 --times 10 --storage jpeg
    python -m bench.large --images 100000 --times 2 --classes 1000 --grouped --stages prepare \
        --no-kills    # many classes and groups

The images are generated, in ten classes; the network is the default one with its ImageNet weights.
With the larger number of images, each stage is killed halfway and started again. Memory is peak
anonymous memory, which the system can't take back. With groups, every four images have a folder of
their own, one image in fifty is a near duplicate of one in another group, and the choice of groups
for a split is also measured separately.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from bench.memory import anonymous, children
from pipeline.dataset import split
from pipeline.stage_runtime.progress import say, track

ROOT = Path(__file__).parent.parent
SIZE, GROUP, TWIN = 64, 4, 50  # pixels a side, images a group, images to a near duplicate
STAGES = {
    "prepare": ("--out", "prepared"),
    "extract": ("--prepared", "prepared", "--out", "features"),
}


def main() -> None:
    """Run with few and with many images, the latter with kills, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--storage", choices=("raw", "jpeg"), default="raw")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--grouped", action="store_true", help="split by groups of images")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--no-kills", action="store_true", help="run each stage once")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    options = parser.parse_args()
    few, many = options.images, options.images * options.times
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        draw(folder / "photos", many, options.classes, options.grouped)
        for i in range(few):
            name = name_of(i, options.classes, options.grouped)
            (folder / "few" / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "photos" / name, folder / "few" / name)
        peaks = {}
        for n, photos in ((few, "few"), (many, "photos")):
            write_params(folder, photos, options.storage, options.grouped)
            kills = n == many and not options.no_kills
            peaks[n] = run(folder, n, options.stages, kills)
            if options.grouped:
                draw_groups(folder / "prepared" / "index.csv")
        for stage in options.stages:
            small, large = (peaks[n][stage] for n in (few, many))
            say(
                f"{stage}: {small / 1e6:.0f} MB with {few:,} images, {large / 1e6:.0f} MB with "
                f"{many:,}: {(large - small) / (many - few):.0f} bytes an image"
            )


def draw(folder: Path, n: int, classes: int, grouped: bool) -> None:
    """Write smooth random pictures as JPEG files."""
    random = np.random.default_rng(0)
    kept: dict[int, NDArray[np.uint8]] = {}  # by class, for a near duplicate in the next group
    for i in track(range(n), n, "draw"):
        number, label = divmod(i, classes)
        light, quality = 9 * (label % 10), 90
        pixels = random.integers(light, 170 + light, (9, 9, 3)).astype(np.uint8)
        if grouped and number % TWIN == 0:
            kept[label] = pixels
        elif grouped and number % TWIN == GROUP:
            pixels, quality = kept.pop(label), 60
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        file = folder / name_of(i, classes, grouped)
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, quality=quality)


def name_of(i: int, classes: int, grouped: bool) -> str:
    """Return the file name of an image."""
    number, label = divmod(i, classes)
    group = f"group{number // GROUP}/" if grouped else ""
    return f"class{label}/{group}{i:07}.jpg"


def draw_groups(index: Path) -> None:
    """Measure the time and the memory of the choice of groups for a test split."""
    with index.open(newline="", encoding="utf-8") as lines:
        rows = [(row["label"], int(row["group"])) for row in csv.DictReader(lines)]
    labels, groups = split.numbered(label for label, _ in rows), np.array([g for _, g in rows])
    labels -= labels.min()
    start = time.process_time()
    split.draw(labels, groups, 0.25, 0)
    busy = time.process_time() - start
    tracemalloc.start()
    with patch.object(split, "DRAWS", 3):  # tracing memory is slow
        split.draw(labels, groups, 0.25, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    say(
        f"split.draw of {len(rows):,} images, {len(np.unique(labels)):,} classes, "
        f"{len(np.unique(groups)):,} groups: {busy:.1f} s of one processor, {peak / 1e6:.0f} MB"
    )


def write_params(folder: Path, photos: str, storage: str, grouped: bool) -> None:
    """Write the project's params, for these images."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"] |= {"source": "folder", "path": photos, "size": SIZE, "storage": storage}
    # All classes have the same groups, as splits have the same classes.
    params["prepare"] |= {"splits": "none", "split_by": "group" if grouped else "image"}
    params["extract"] |= {"image_size": SIZE, "views": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def run(folder: Path, n: int, stages: Sequence[str], with_kills: bool) -> dict[str, int]:
    """Run stages on n images; return the peak of anonymous memory of each, in bytes."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    peaks = {}
    for stage in stages:
        if with_kills:
            seconds = watched(stage, folder).seconds
            undisturbed = digest(folder, stage)
            shutil.rmtree(folder / "cache")
            watched(stage, folder, seconds / 2)
        seconds, busy, peaks[stage] = watched(stage, folder)
        timing = json.loads((folder / f"{stage}.json").read_text())[stage]
        rate = timing["images_per_second"]
        say(
            f"{stage} of {n:,} images: {seconds:.0f} s ({busy:.0f} s of one processor), "
            f"{rate:.0f} images/s"
        )
        if with_kills:
            same = digest(folder, stage) == undisturbed
            say(f"{stage} killed and gone on: " + ("the same bytes" if same else "OTHER BYTES"))
            if not same:
                sys.exit(1)
    return peaks


class Watched(NamedTuple):
    """Time and memory of a stage."""

    seconds: float
    busy: float  # seconds of one processor, whatever else the machine does
    peak: int  # bytes of anonymous memory


def watched(stage: str, folder: Path, until: float = float("inf")) -> Watched:
    """Run a stage, or kill it after `until` seconds."""
    words = [sys.executable, "-m", "pipeline", stage, *STAGES[stage]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PIPELINE_CACHE": str(folder / "cache")}
    start, before, highest = time.perf_counter(), os.times(), 0
    process = subprocess.Popen(
        [*words, "--timing", f"{stage}.json"],
        cwd=folder,
        env={**env, "PIPELINE_SAVE_SECONDS": "10"},
    )
    while process.poll() is None:
        for worker in children(process.pid):  # the stage works in a child
            highest = max(highest, anonymous(worker))
            if time.perf_counter() - start > until:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
        time.sleep(0.05)
    if (process.returncode == 0) != (until == float("inf")):
        sys.exit(f"error: {stage} ended with {process.returncode}")
    seconds, after = time.perf_counter() - start, os.times()
    busy = sum(after[2:4]) - sum(before[2:4])  # of the stage and its child
    return Watched(seconds, busy, highest)


def digest(folder: Path, stage: str) -> str:
    """Hash what a stage wrote."""
    found = sha256()
    for file in sorted((folder / STAGES[stage][-1]).rglob("*")):
        if file.is_file():
            with file.open("rb") as content:
                while part := content.read(1 << 24):
                    found.update(part)
    return found.hexdigest()


if __name__ == "__main__":
    main()
