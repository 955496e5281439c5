"""Check that two processes run the same experiment as one: stage 2 on the default data, float32.

    dvc repro stage1 && python -m bench.same
    python -m bench.same --project FOLDER    # of another run than this project's

Prints the differences of the losses of the first steps, and of the final weights, between two
processes and one, and between one thread and two, whose rounding differs too. The difference of
weights is relative to how far training moved them, in the norm over all weights. Exits with 1 if
the two processes differ much more than the threads, or if nothing moved.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from pipeline.stage_runtime.progress import say

ROOT = Path(__file__).parent.parent
LOSSES = "BENCH_LOSSES"  # where a stage that this command started writes the losses of its steps
START = "models/stage1/model.safetensors"
# Losses of steps in nats, and weights as a fraction of their movement.
FIRST, CLOSE, WEIGHTS_CLOSE = 20, 1e-4, 0.1
# Processes and threads; all are compared with the first.
WAYS = {"one process, two threads": (1, 2), "two processes": (2, 2), "one thread": (1, 1)}

Weights = dict[str, NDArray[Any]]


class Ran(NamedTuple):
    """The results of a run of stage 2."""

    losses: list[float]  # of its steps
    history: list[dict[str, str]]
    weights: Weights


def main() -> None:
    """Run stage 2 in each variant and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--project", type=Path, default=ROOT, help="where the run is")
    project = parser.parse_args().project.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            name: run(project, Path(scratch) / name.replace(" ", "-"), *way)
            for name, way in WAYS.items()
        }
    start = load_file(project / START)
    one, *others = found.values()
    worst, off = [], []
    for name, other in zip(list(found)[1:], others, strict=True):
        pairs = zip(other.losses[:FIRST], one.losses[:FIRST], strict=True)
        apart = [abs(a - b) for a, b in pairs]
        within = next((i for i, gap in enumerate(apart) if gap > CLOSE), len(apart))
        worst.append(max(apart))
        off.append(apart_of(start, one.weights, other.weights))
        columns = ("train_loss", "val_loss")
        last = {c: float(other.history[-1][c]) - float(one.history[-1][c]) for c in columns}
        said = ", ".join(f"{column} {gap:+.4f}" for column, gap in last.items())
        say(
            f"{name} against {next(iter(WAYS))}: the first {within} steps' losses within {CLOSE:g},"
            f" the first {len(apart)} within {worst[-1]:.1g}; in the last epoch {said}; the weights"
            f" {100 * off[-1]:.2g} % of their movement apart"
        )
    sys.exit(worst[0] > max(10 * worst[1], CLOSE) or off[0] > max(10 * off[1], WEIGHTS_CLOSE))


def apart_of(start: Weights, one: Weights, two: Weights) -> float:
    """Return the difference of two runs' weights, relative to the movement of the first's.

    Both are Euclidean norms over all weights; the result is infinite if nothing moved.
    """

    def norm(a: Weights, b: Weights) -> float:
        squares = [((a[k].astype(np.float64) - b[k].astype(np.float64)) ** 2).sum() for k in a]
        return float(np.sqrt(sum(squares)))

    moved = norm(one, start)
    return norm(two, one) / moved if moved else float("inf")


def run(project: Path, folder: Path, n: int, threads: int) -> Ran:
    """Run stage 2 in n processes on a project's outputs, into a folder."""
    env = {"PIPELINE_CACHE": str(folder), LOSSES: str(folder / "losses"), "PYTHONPATH": str(ROOT)}
    env |= {"PIPELINE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads // n)}
    folder.mkdir()
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["precision"] = "fp32"
    params["stage2"]["interpolate"] = False  # the trained weights alone
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    ways: dict[str, str | Path] = {"prepared": "data/prepared", "stage1": START}
    ways |= {"params": folder / "params.yaml", "out": folder / "out", "timing": folder / "t.json"}
    words = [str(word) for name, path in ways.items() for word in (f"--{name}", path)]
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    start = [*torchrun, "--nproc-per-node", str(n), "-m"] if n > 1 else []
    subprocess.run(
        [sys.executable, "-m", *start, "bench.same", "--as-stage2", *words],
        cwd=project,
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    losses = [float(line) for line in (folder / "losses").read_text().split()]
    with (folder / "out/history.csv").open() as lines:
        history = list(csv.DictReader(lines))
    return Ran(losses, history, load_file(folder / "out/model.safetensors"))


def as_stage2() -> None:
    """Run stage 2 and record the loss of each step."""
    from pipeline import stage2
    from pipeline.launcher.stage import main as stage
    from pipeline.stage_runtime.distributed import all_reduce_gradients
    from pipeline.stage_runtime.settings import rank
    from pipeline.training import fit

    def noted(model: nn.Module, *numbers: float) -> list[float]:
        found = all_reduce_gradients(model, *numbers)
        if rank() == 0:
            with Path(os.environ[LOSSES]).open("a") as file:
                file.write(f"{found[0]!r}\n")
        return found

    with patch.object(fit, "all_reduce_gradients", noted):
        stage(stage2.stage2)


if __name__ == "__main__":
    if "--as-stage2" in sys.argv:
        sys.argv.remove("--as-stage2")
        as_stage2()
    else:
        main()
