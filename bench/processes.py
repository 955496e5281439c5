"""Compare extract and stage 2 in two processes with one process that has both threads.

    dvc repro stage1 && python -m bench.processes --rounds 3
    python -m bench.processes --rounds 1 --project FOLDER    # of another run than this project's

Each round runs all variants one after the other, so that other load on the machine affects all of
them. Rates are in images per second, without start-up; that of stage 2 is of its only epoch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import yaml

from pipeline.stage_runtime.progress import say

ROOT = Path(__file__).parent.parent
STAGE1 = "models/stage1/model.safetensors"
WAYS = {
    "one process, two threads": {"PIPELINE_PROCESSES": "1", "PIPELINE_THREADS": "2"},
    "one process, one thread": {"PIPELINE_PROCESSES": "1", "PIPELINE_THREADS": "1"},
    "two processes, one thread each": {"PIPELINE_PROCESSES": "2", "PIPELINE_THREADS": "2"},
}


def main() -> None:
    """Print the rates of each variant as ratios to those of the first, the median over rounds."""
    parser = argparse.ArgumentParser(prog="python -m bench.processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--project", type=Path, default=ROOT, help="where the run is")
    options = parser.parse_args()
    rounds = [one_round(options.project) for _ in range(options.rounds)]
    for stage in ("extract", "stage2"):
        for way in WAYS:
            ratios = [found[stage, way] / found[stage, next(iter(WAYS))] for found in rounds]
            rate = median(found[stage, way] for found in rounds)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            say(f"{stage:<8} {way:<31} {median(ratios):.2f} ({spread})  {rate:.0f} images/s")


def one_round(project: Path) -> dict[tuple[str, str], float]:
    """Run both stages in every variant; return their rates in images per second."""
    found = {}
    for way, env in WAYS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            params = yaml.safe_load((project / "params.yaml").read_text())
            params["stage2"] |= {"epochs": 1, "interpolate": False}
            (folder / "params.yaml").write_text(yaml.safe_dump(params))
            extract = run("extract", project, folder, env)
            stage2 = run("stage2", project, folder, env, stage1=STAGE1)
            rows = (project / "data/prepared/index.csv").read_text().count(",train,")
            found["extract", way] = extract["images_per_second"]
            found["stage2", way] = rows / stage2["epochs_seconds"]
    return found


def run(
    stage: str, project: Path, folder: Path, env: dict[str, str], **paths: str
) -> dict[str, float]:
    """Run a stage on a project's outputs with an empty cache, into a folder; return its timing."""
    ways: dict[str, str | Path] = {
        "prepared": "data/prepared",
        "params": folder / "params.yaml",
        "out": folder / stage,
    }
    ways |= {"timing": folder / "timing.json", **paths}
    words = [str(word) for name, path in ways.items() for word in (f"--{name}", path)]
    subprocess.run(
        [sys.executable, "-m", "pipeline", stage, *words],
        cwd=project,
        env={
            **os.environ,
            **env,
            **{"PIPELINE_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
        },
        stdout=subprocess.DEVNULL,
        check=True,
    )
    timing: dict[str, dict[str, float]] = json.loads((folder / "timing.json").read_text())
    return timing[stage]


if __name__ == "__main__":
    main()
