"""Many images through prepare and extract: rates, memory, and a kill in the middle of each.

    python -m bench.large                                # 20,000 and 200,000 images of 64 pixels
    python -m bench.large --images 2000 --times 10 --storage jpeg

The images are drawn, in ten classes; the network is the default one with its ImageNet weights. Of
the many, each stage is killed halfway and started again. What a stage may have in memory is what
the system can't take back: anonymous memory, the highest of any moment.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from bench.memory import anonymous, children
from pipeline.progress import say, track

ROOT = Path(__file__).parent.parent
SIZE, CLASSES = 64, 10
STAGES = {
    "prepare": ("--out", "prepared"),
    "extract": ("--prepared", "prepared", "--out", "features"),
}


def main() -> None:
    """Run few and many, the many with kills, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--storage", choices=("raw", "jpeg"), default="raw")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    options = parser.parse_args()
    few, many = options.images, options.images * options.times
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        draw(folder / "photos", many)
        (folder / "few").mkdir()
        for name in sorted(os.listdir(folder / "photos")):
            (folder / "few" / name).mkdir()
            for file in sorted(os.listdir(folder / "photos" / name))[: few // CLASSES]:
                os.link(folder / "photos" / name / file, folder / "few" / name / file)
        peaks = {n: run(folder, n, options.storage, n == many) for n in (few, many)}
        for stage in STAGES:
            small, large = (peaks[n][stage] for n in (few, many))
            say(
                f"{stage}: {small / 1e6:.0f} MB with {few:,} images, {large / 1e6:.0f} MB with "
                f"{many:,}: {(large - small) / (many - few):.0f} bytes an image"
            )


def draw(folder: Path, n: int) -> None:
    """Write smooth random pictures as JPEG files."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for i in track(range(n), n, "draw"):
        label = i % CLASSES
        pixels = random.integers(9 * label, 170 + 9 * label, (9, 9, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image.save(folder / f"class{label}" / f"{i:07}.jpg", quality=90)


def run(folder: Path, n: int, storage: str, with_kills: bool) -> dict[str, int]:
    """Run both stages on n images; gives each one's peak of anonymous memory, in bytes."""
    photos = "photos" if with_kills else "few"
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"] |= {"source": "folder", "path": photos, "size": SIZE, "storage": storage}
    params["prepare"] |= {"split_by": "image"}
    params["extract"] |= {"image_size": SIZE, "views": 1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    peaks = {}
    for stage in STAGES:
        if with_kills:
            seconds, _ = watched(stage, folder)
            undisturbed = digest(folder, stage)
            shutil.rmtree(folder / "cache")
            watched(stage, folder, seconds / 2)
        seconds, peaks[stage] = watched(stage, folder)
        timing = json.loads((folder / f"{stage}.json").read_text())[stage]
        rate = timing["images_per_second"]
        say(f"{stage} of {n:,} images: {seconds:.0f} s, {rate:.0f} images/s")
        if with_kills:
            same = digest(folder, stage) == undisturbed
            say(f"{stage} killed and gone on: " + ("the same bytes" if same else "OTHER BYTES"))
            if not same:
                sys.exit(1)
    return peaks


def watched(stage: str, folder: Path, until: float = float("inf")) -> tuple[float, int]:
    """Run a stage, or kill it after so long; gives the seconds and its peak of memory."""
    words = [sys.executable, "-m", f"pipeline.{stage}", *STAGES[stage]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PIPELINE_CACHE": str(folder / "cache")}
    start, highest = time.perf_counter(), 0
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
    return time.perf_counter() - start, highest


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
