"""Is it the same experiment by two processes as by one? Stage 2 on the default data, in float32.

    dvc repro stage1 && python -m bench.same

Prints how far the losses of the first steps are apart, and those of the last epoch: by two
processes and by one, and by one with one thread and with two, which round otherwise too. Exit code
1 if two processes are much further apart than that.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from pipeline.progress import say

ROOT = Path(__file__).parent.parent
LOSSES = "BENCH_LOSSES"  # where a stage that this command started writes the losses of its steps
FIRST, CLOSE, LAST_CLOSE = 20, 1e-4, 0.02
# Processes and threads: all against the first.
WAYS = {"one process, two threads": (1, 2), "two processes": (2, 2), "one thread": (1, 1)}


def main() -> None:
    """Run stage 2 in each way and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            name: run(Path(scratch) / name.replace(" ", "-"), *way) for name, way in WAYS.items()
        }
    (steps, history), *others = found.values()
    worst, close = [], []
    for name, (other_steps, other) in zip(list(found)[1:], others, strict=True):
        apart = [abs(a - b) for a, b in zip(steps[:FIRST], other_steps[:FIRST], strict=True)]
        within = next((i for i, off in enumerate(apart) if off > CLOSE), FIRST)
        last = {c: float(other[-1][c]) - float(history[-1][c]) for c in ("train_loss", "val_loss")}
        said = ", ".join(f"{column} {off:+.4f}" for column, off in last.items())
        say(
            f"{name} against {next(iter(WAYS))}: the first {within} steps' losses within {CLOSE:g},"
            f" the first {FIRST} within {max(apart):.1g}; in the last epoch {said}"
        )
        worst.append(max(apart))
        close.append(all(abs(off) <= LAST_CLOSE for off in last.values()))
    sys.exit(worst[0] > 10 * worst[1] or not close[0])


def run(folder: Path, n: int, threads: int) -> tuple[list[float], list[dict[str, str]]]:
    """Run stage 2 in n processes; gives the losses of its steps, and its history."""
    env = {"PIPELINE_CACHE": str(folder), LOSSES: str(folder / "losses")}
    env |= {"PIPELINE_THREADS": str(threads), "OMP_NUM_THREADS": str(threads // n)}
    folder.mkdir()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["precision"] = "fp32"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    ways = {"prepared": "data/prepared", "stage1": "models/stage1/model.safetensors"}
    ways |= {"params": folder / "params.yaml", "out": folder / "out", "timing": folder / "t.json"}
    words = [str(word) for name, path in ways.items() for word in (f"--{name}", path)]
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    start = [*torchrun, "--nproc-per-node", str(n), "-m"] if n > 1 else []
    subprocess.run(
        [sys.executable, "-m", *start, "bench.same", "--as-stage2", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    losses = [float(line) for line in (folder / "losses").read_text().split()]
    with (folder / "out/history.csv").open() as lines:
        return losses, list(csv.DictReader(lines))


def as_stage2() -> None:
    """Be stage 2, and note the loss of each step."""
    from pipeline import stage2
    from pipeline.learn import fit
    from pipeline.runtime import rank
    from pipeline.stage import main as stage

    add_up = fit.add_up

    def noted(*given: object) -> list[float]:
        found = add_up(*given)  # type: ignore[arg-type]
        if rank() == 0:
            with Path(os.environ[LOSSES]).open("a") as file:
                file.write(f"{found[0]!r}\n")
        return found

    fit.add_up = noted
    stage(stage2.stage2)


if __name__ == "__main__":
    if "--as-stage2" in sys.argv:
        sys.argv.remove("--as-stage2")
        as_stage2()
    else:
        main()
