"""Is it the same experiment by two processes as by one? Stage 2 on the default data, in float32.

    dvc repro stage1 && python -m bench.same

Prints how far the losses of the first steps are apart, and those of the last epoch. Exit code 1 if
they are further apart than rounding makes them.
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


def main() -> None:
    """Run stage 2 both ways and compare."""
    with tempfile.TemporaryDirectory() as scratch:
        one, two = (run(Path(scratch) / str(n), n) for n in (1, 2))
    steps = [abs(a - b) for a, b in zip(one[0][:FIRST], two[0][:FIRST], strict=True)]
    say(f"first {FIRST} of {len(one[0])} steps: losses at most {max(steps):.1g} apart")
    last = {}
    for column in ("train_loss", "val_loss"):
        a, b = (float(history[-1][column]) for _, history in (one, two))
        last[column] = abs(a - b)
        say(f"{column} of the last epoch: {a:.5f} by one process, {b:.5f} by two")
    sys.exit(max(steps) > CLOSE or max(last.values()) > LAST_CLOSE)


def run(folder: Path, n: int) -> tuple[list[float], list[dict[str, str]]]:
    """Run stage 2 in n processes; gives the losses of its steps, and its history."""
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
        env={**os.environ, "PIPELINE_CACHE": str(folder), LOSSES: str(folder / "losses")},
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
