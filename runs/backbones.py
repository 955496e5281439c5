"""Compare backbones by their probes over data sets and seeds, from codes computed once.

    python -m runs.backbones elpv-image elpv-group clothing=FOLDER signs=FOLDER
    python -m runs.backbones elpv-group --backbones timm/tf_efficientnet_lite0 timm/NAME --seeds 5 6

Each seed draws splits of the images, and the probe is chosen by cross-validation on the training
images. Prints the cross-validated accuracies, their difference from the first backbone's, paired by
seed, and the seconds of extract, each at the backbone's own size. Finished parts are kept.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from pipeline.stage_runtime.progress import say
from runs.trials import Trial

LITE = tuple(f"timm/tf_efficientnet_lite{n}" for n in (0, 1, 2))


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("sets", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--backbones", nargs="+", default=LITE)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5, 10))
    parser.add_argument("--keep", type=Path, default=Path("data/trials"), help="for finished parts")
    options = parser.parse_args()
    apart: dict[str, list[float]] = {name: [] for name in options.backbones}
    lines = []
    for text in options.sets:
        trial = Trial.named(text, options.keep)
        found = {name: cross_validated(trial, name, options.seeds) for name in options.backbones}
        first, first_seconds = next(iter(found.values()))
        for name, (accuracies, seconds) in found.items():
            gaps = [100 * (a - b) for a, b in zip(accuracies, first, strict=True)]
            apart[name].append(mean(gaps))
            spread = f" ± {stdev(gaps):.1f}" if len(gaps) > 1 else ""
            lines.append(
                f"{trial.name:<12} {name:<32} {mean(accuracies):.4f}  {mean(gaps):+.1f}{spread} "
                f"points  extract {seconds:.0f} s, {seconds / first_seconds:.2f} of the first's"
            )
    for line in lines:
        say(line)
    for name, gaps in apart.items():
        say(f"{'mean':<12} {name:<32} {mean(gaps):+.2f} points over {len(gaps)} sets")


def cross_validated(trial: Trial, backbone: str, seeds: list[int]) -> tuple[list[float], float]:
    """Return a backbone's cross-validated accuracies by seed, and the seconds of extract."""
    _, seconds = trial.codes(backbone)
    files = [trial.probed(seed, backbone) / "metrics.json" for seed in seeds]
    return [json.loads(file.read_text())["probe"]["cv_accuracy"] for file in files], seconds


if __name__ == "__main__":
    main()
