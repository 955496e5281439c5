"""Measure the time and the test accuracy of a whole run: ours and each peer's, as commands.

    python -m bench.whole                            # in an environment made by `make bench`
    python -m bench.whole --peers tutorial           # only some of them
    python -m bench.whole --peers tutorial --epochs 1 --project FOLDER    # of another repository

Ours is `dvc repro` of the last commit in a fresh clone with empty caches, including the start-up of
every stage; the time of a model ends with its stage. The time of a peer is that of its process.
Test accuracies are on the same images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bench.peers import PEERS
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import threads

ROOT = Path(__file__).parent.parent
STAGES = {"probe": "probe", "stage1": "stage1", "stage2": "stage2"}  # by the model they make


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=sorted(PEERS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="of each peer, not those of the comparison")
    parser.add_argument("--project", type=Path, default=ROOT, help="the repository to clone")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            clone, env = cloned(options.project.resolve(), Path(scratch))
            found: dict[str, Any] = {"ours": ours(clone, env)}
            found |= {peer: theirs(peer, options.epochs, clone, env) for peer in options.peers}
        rounds.append(found)
        for line in table(found):
            say(line)
    if options.json:
        options.json.write_text(
            json.dumps({"threads": threads(), "rounds": rounds}, indent=2) + "\n"
        )


def cloned(project: Path, scratch: Path) -> tuple[Path, dict[str, str]]:
    """Clone the last commit, with an empty cache; return the clone and its environment."""
    clone = scratch / "clone"
    subprocess.run(["git", "clone", "--quiet", str(project), str(clone)], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return clone, {**os.environ, "PATH": path, "PIPELINE_CACHE": str(scratch / "cache")}


def ours(clone: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run the graph; return each model's test accuracy and the seconds until its stage ended."""
    started = time.time()
    subprocess.run(["dvc", "repro", "--quiet"], cwd=clone, env=env, check=True)
    seconds = time.time() - started
    report = json.loads((clone / "models/report/metrics.json").read_text())
    models = {
        model: {
            "accuracy": report["test"][model]["accuracy"],
            "seconds": (clone / f"models/{stage}/timing.json").stat().st_mtime - started,
        }
        for model, stage in STAGES.items()
    }
    chosen = report["test"][report["chosen"]]["accuracy"]
    extract = json.loads((clone / "models/extract/timing.json").read_text())["extract"]["seconds"]
    search = linear_search(clone, env) / extract
    return {"models": models, "chosen": {"accuracy": chosen, "seconds": seconds}, "search": search}


def linear_search(clone: Path, env: dict[str, str]) -> float:
    """Run the probe stage with linear probes only, for all depths and C; return the seconds."""
    params = yaml.safe_load((clone / "params.yaml").read_text())
    params["probe"]["kinds"] = ["linear"]
    (clone / "linear.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", "pipeline", "probe", "--params", "linear.yaml"]
    command += ["--features", "data/features", "--out", "linear", "--timing", "linear/timing.json"]
    subprocess.run(command, cwd=clone, env=env, check=True)
    found: float = json.loads((clone / "linear/timing.json").read_text())["probe"]["seconds"]
    return found


def theirs(peer: str, epochs: int | None, clone: Path, env: dict[str, str]) -> dict[str, float]:
    """Run a peer on the clone's splits; return its test accuracy and the seconds of its process."""
    file = clone / f"{peer}.json"
    command = [sys.executable, "-m", "bench.peers", peer, "--json", str(file)]
    command += ["--epochs", str(epochs)] if epochs else []
    started = time.time()
    subprocess.run(command, cwd=clone, env={**env, "PYTHONPATH": str(ROOT)}, check=True)
    return {"accuracy": json.loads(file.read_text())["accuracy"], "seconds": time.time() - started}


def table(found: dict[str, Any]) -> list[str]:
    """Return a round as lines of text: each peer with our first model that is as good."""
    own, chosen = found["ours"]["models"], found["ours"]["chosen"]
    lines = [
        f"{name:<10} test acc {model['accuracy']:.4f} after {model['seconds']:5.0f} s"
        for name, model in {**own, "chosen": chosen}.items()
    ]
    lines.append(f"linear search / extraction: {found['ours']['search']:.2f}")
    for peer in (p for p in PEERS if p in found):
        result = found[peer]
        as_good = [m["seconds"] for m in own.values() if m["accuracy"] >= result["accuracy"]]
        ratio = f"{result['seconds'] / min(as_good):.1f} times ours" if as_good else "never by ours"
        ahead = 100 * (chosen["accuracy"] - result["accuracy"])
        lines.append(
            f"{peer:<10} test acc {result['accuracy']:.4f} after {result['seconds']:5.0f} s: "
            f"{ratio} to reach that; our chosen model {ahead:+.1f} points"
        )
    return lines


if __name__ == "__main__":
    main()
