"""Compare the start-up time of each stage with the bare import of the libraries it uses.

    python -m bench.startup
    python -m bench.startup --rounds 3
    python -m bench.startup --rounds 1 --stages prepare    # a quick look

Each start is a process of its own: either `import pipeline.STAGE`, or the import of all modules of
other packages that this loads, in the same order. The two take turns; a ratio is taken within a
round. The last line is the pipeline with nothing to do: `dvc repro` of an up-to-date graph.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import STAGES
from pipeline.stage_runtime.settings import threads

LIST = """
import sys
before = set(sys.modules)
import pipeline.{stage}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if name not in before and "site-packages" in file:
        print(name)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options = parser.parse_args()
    rounds = options.rounds
    say(f"{threads()} threads, {rounds} rounds: seconds to start, and over the bare imports")
    for stage in options.stages:
        names = python(LIST.format(stage=stage)).split()
        bare = importing(names)
        taken = []
        for _ in range(rounds + 1):  # the first one warms the disk's cache
            of_stage = seconds([sys.executable, "-c", f"import pipeline.{stage}"])
            taken.append((of_stage, seconds([sys.executable, "-c", bare])))
        ratios = [ours / theirs for ours, theirs in taken[1:]]
        start = median(ours for ours, _ in taken[1:])
        say(
            f"{stage:<9} {start:5.2f} s  {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    dvc = [str(Path(sys.executable).parent / "dvc"), "repro", "--quiet"]
    nothing = [seconds(dvc) for _ in range(rounds + 1)][1:]
    say(f"dvc repro {median(nothing):5.2f} s  ({min(nothing):.2f} to {max(nothing):.2f})")


def importing(names: list[str]) -> str:
    """Return a program that imports modules by name; some names can't be imported by themselves."""
    # torchvision needs two operators declared first, beside a CPU build of PyTorch.
    first = (
        "from pipeline.nets.torchvision_import import torchvision\n"
        if "torchvision" in names
        else ""
    )
    return (
        f"import importlib\n{first}"
        f"for name in {names!r}:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except ImportError:\n        pass\n"
    )


def python(program: str) -> str:
    """Run a program and return its output."""
    words = [sys.executable, "-c", program]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def seconds(words: list[str]) -> float:
    """Time a process from its start to its end."""
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
