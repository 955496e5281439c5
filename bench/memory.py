"""Measure how the peak memory of each stage grows with twenty times the images.

    python -m bench.memory
    python -m bench.memory --images 200 --times 5    # a quick look

The images are generated, with 64 pixels a side; the network is tiny. Only anonymous memory counts,
because the system can take back the pages of mapped files. The probe is left out: it fits all codes
(N, D) at once, and its SVMs need a kernel of at most `probe.svm_max_images` squared.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import save_file

from pipeline.nets.backbone import pretrained
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import STAGES

ROOT = Path(__file__).parent.parent
NETWORK = "timm/test_efficientnet"
SIZE = 64
LINEAR = {"kinds": ["linear"], "linear_c": [0.01], "join": 0, "folds": 2}
SHORT = {"image_size": SIZE, "epochs": 1}


def main() -> None:
    """Run with both numbers of images and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    few, many = (peaks(n) for n in (options.images, options.images * options.times))
    ratios = {stage: many[stage] / few[stage] for stage in STAGES if stage != "probe"}
    for stage, ratio in ratios.items():
        say(f"{stage:<9} {few[stage] / 1e6:6.0f} MB, {many[stage] / 1e6:6.0f} MB: {ratio:.2f}")
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=2) + "\n")


def peaks(n: int) -> dict[str, int]:
    """Run the stages on `n` images; return the peak of anonymous memory of each, in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pipeline").symlink_to(ROOT / "pipeline")
        draw(folder / "photos", n)
        (folder / "params.yaml").write_text(yaml.safe_dump(small_params(folder)))
        graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        return {stage: peak(graph[stage]["cmd"].split()[1:], folder) for stage in STAGES}


def draw(folder: Path, n: int) -> None:
    """Write images of noise in two classes, one of them brighter."""
    random = np.random.default_rng(0)
    for label in range(2):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(n // 2):
            pixels = random.integers(40 * label, 200 + 40 * label, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i:06}.jpg")


def small_params(folder: Path) -> dict[str, object]:
    """Return the project's params, for a tiny network on small images."""
    model, _ = pretrained(NETWORK, "none", "", seed=0)
    weights = folder / "weights.safetensors"
    save_file(model.state_dict(), weights)
    digest = sha256(weights.read_bytes()).hexdigest()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["backbone"] |= {"name": NETWORK, "weights": str(weights), "sha256": digest}
    params["prepare"] |= {"source": "folder", "path": "photos", "size": SIZE, "split_by": "image"}
    params["extract"] |= {"image_size": SIZE, "views": 1}
    params["probe"] |= LINEAR
    params["stage1"] |= {**SHORT, "unfreeze": ["blocks.4"], "views": 2}
    params["stage2"] |= SHORT
    params["evaluate"] |= {"views": 1}
    return dict(params)


def peak(command: list[str], folder: Path) -> int:
    """Run a stage and return its peak anonymous memory."""
    env = {**os.environ, "PIPELINE_CACHE": str(folder / "cache")}
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=env)
    highest = 0
    while process.poll() is None:
        # A stage runs in a child of the process that was started.
        highest = max(highest, *map(anonymous, [process.pid, *children(process.pid)]))
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    return highest


def children(pid: int) -> list[int]:
    """List the processes that a process started; none if it is gone."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def anonymous(pid: int) -> int:
    """Return a process's anonymous memory in bytes, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
