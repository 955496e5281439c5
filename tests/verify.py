"""Run the graph in two clean clones and compare every output's hash but the timings'.

    python tests/verify.py                # as the environment has it
    python tests/verify.py --threads 1    # and once more with another number of threads

The clones are of the last commit, each with empty caches. With `--threads` a third clone runs with
so many, and the differences of its metrics are printed: another number of threads rounds otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from repository import ROOT, environment, flat, hashes


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, help="a third run with so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        first, second = (ran(Path(scratch) / name) for name in ("first", "second"))
        same = True
        for out, digest in hashes(first).items():
            equal = hashes(second)[out] == digest
            same &= equal
            print(f"{'equal' if equal else 'OTHER'}  {digest}  {out}")
        print("all outputs are equal" if same else "the outputs differ")
        if options.threads:
            third = ran(Path(scratch) / "third", PIPELINE_THREADS=str(options.threads))
            compare(first, third, options.threads)
    sys.exit(not same)


def ran(clone: Path, **settings: str) -> Path:
    """Clone the last commit and run its graph."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = {**environment(clone), "DVC_SITE_CACHE_DIR": f"{clone}-site", **settings}
    if "PIPELINE_THREADS" in settings:
        env["OMP_NUM_THREADS"] = settings["PIPELINE_THREADS"]
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--quiet"]
    subprocess.run(command, cwd=clone, env=env, check=True)
    return clone


def compare(first: Path, other: Path, threads: int) -> None:
    """Print which outputs another number of threads leaves equal, and how far metrics move."""
    equal = [out for out, digest in hashes(first).items() if hashes(other)[out] == digest]
    print(f"with {threads} thread(s) instead of {os.cpu_count()}, equal: {', '.join(equal)}")
    for name in ("probe", "stage1", "stage2", "report"):
        one, two = (dict(numbers(folder, name)) for folder in (first, other))
        for key in (key for key in one if key.endswith("accuracy")):
            print(f"{key:<45} {one[key]:.4f}, {two[key]:.4f}: {two[key] - one[key]:+.4f}")


def numbers(folder: Path, stage: str) -> Iterator[tuple[str, float]]:
    """Read the numbers in a stage's metrics.json by their dotted keys."""
    text = (folder / "models" / stage / "metrics.json").read_text()
    for key, value in flat(json.loads(text)).items():
        if isinstance(value, (int, float)):
            yield key, float(value)


if __name__ == "__main__":
    main()
