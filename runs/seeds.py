"""Repeat the graph over seeds as DVC experiments and print test accuracies, mean and spread.

    python runs/seeds.py elpv-image
    python runs/seeds.py elpv-group
    python runs/seeds.py hymenoptera --path FOLDER    # the one with train/ and val/
    python runs/seeds.py digits --path data/digits    # from runs/sets.py; emoji, wafers too
    python runs/seeds.py digits --path data/digits --set backbone.weights=none
    python runs/seeds.py mine --set prepare.source=folder --set prepare.path=data/mine

Each run is a `dvc exp run --temp` of the last commit: it leaves the workspace alone, its metrics
stay under the experiment's name, and what has run before is taken from the cache.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import dvc.api

SETTINGS = {
    "elpv-image": ["prepare.split_by=image"],
    "elpv-group": ["prepare.split_by=group"],
    # The official 153 are the test split; validation is cut from the official training images.
    "hymenoptera": [
        "prepare.source=folder",
        "prepare.not_images=skip",
        "prepare.val_as=test",
        "flips=horizontal",
        # Size and fit by cross-validation on the 244 training images.
        "prepare.size=288",
        "prepare.fit=crop",
        "extract.image_size=288",
        # Some 200 images are too few to tune a layer for: the head alone, then all, gently.
        "stage1.unfreeze=[]",
        "stage1.image_size=288",
        "stage1.views=2",  # as many as there are horizontal flips
        "stage1.lr=1.0e-4",
        "stage2.image_size=288",
    ],
    # The recipe of PyTorch's tutorial on them: everything trains, from a random head.
    "tutorial": [
        "prepare.source=folder",
        "prepare.not_images=skip",
        "prepare.val_as=test",
        "prepare.size=256",
        "prepare.fit=crop",
        "flips=horizontal",
        "augment.crop=0.08",
        "stage1.unfreeze=['*']",
        "stage1.head_init=random",
        "stage1.image_size=224",
        "stage1.views=0",
        "stage1.batchnorm=train",
        "stage1.epochs=25",
        "stage1.batch_size=4",
        "stage1.optimizer=sgd",
        "stage1.lr=1.0e-3",
        "stage1.layer_decay=1.0",
        "stage1.weight_decay=0.0",
        "stage1.schedule=step",
        "stage1.warmup_epochs=0.0",
        "evaluate.views=1",
    ],
    "digits": ["prepare.source=folder", "prepare.split_by=image", "flips=none"],
    "emoji": ["prepare.source=folder", "flips=horizontal"],
    "wafers": ["prepare.source=folder"],
    # The same with few images to train on, and many to test.
    "elpv-few": ["prepare.test_fraction=0.8"],
    "digits-few": [
        *("prepare.source=folder", "prepare.split_by=image", "flips=none"),
        "prepare.test_fraction=0.85",
    ],
    "emoji-few": ["prepare.source=folder", "flips=horizontal", "prepare.test_fraction=0.8"],
}
EVIDENCE = ("early", "late", "source_confidence", "source_information")
MODELS = ("probe_linear", "probe", "stage1", "stage2")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("name")
    parser.add_argument("--path", type=Path, help="the images, for a source that is a folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    changes = [*SETTINGS.get(options.name, []), *options.set]
    if options.path:
        changes.append(f"prepare.path={options.path.resolve()}")

    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        experiment = f"{options.name}-{seed}"
        run(experiment, [*changes, f"seed={seed}"])
        metrics = dvc.api.metrics_show(rev=experiment)
        test, chosen = metrics["test"], metrics["chosen"]
        row = {m: test[m]["accuracy"] for m in MODELS} | {"chosen": test[chosen]["accuracy"]}
        row["chosen, weighted"] = test[chosen]["accuracy_weighted"]
        row["probe, weighted"] = test["probe"]["accuracy_weighted"]
        for name, value in row.items():
            found.setdefault(name, []).append(value)
        cells = (f"{k} {v:.4f}" for k, v in row.items())
        print(f"seed {seed}: {chosen:>7} chosen", *cells, sep="  ", flush=True)
        print(f"  {told(metrics)}", flush=True)
    print(f"\n{options.name}, {len(options.seeds)} seeds: test accuracy")
    for name, values in found.items():
        spread = stdev(values) if len(values) > 1 else 0.0
        print(f"{name:<18} {mean(values):.4f} ± {spread:.4f}")


def told(metrics: dict[str, Any]) -> str:
    """Say what was advised, what happened, and how long it took."""
    advice, gain = metrics["advice"], metrics["stage2_minus_probe"]
    parts = [
        f"stage 2 minus probe {gain['accuracy']:+.3f} ({gain['low']:+.3f}..{gain['high']:+.3f})"
    ]
    if advice["case"]:
        found, expected = advice["evidence"], advice["expected_gain"]
        parts.insert(0, f"case {advice['case']}, {found['images']} images to train on")
        parts.append(
            f"expected {expected['gain']:+.3f} ({expected['low']:+.3f}..{expected['high']:+.3f})"
        )
        parts.append(", ".join(f"{k} {found[k]:.3f}" for k in EVIDENCE))
    stages = ("prepare", "extract", "probe", "advise", "stage1", "stage2", "evaluate")
    timing = {s: metrics.get(s) or metrics[f"models/{s}/timing.json:{s}"] for s in stages}
    parts.append("seconds " + " ".join(f"{s} {t['seconds']:.0f}" for s, t in timing.items()))
    return "; ".join(parts)


def run(experiment: str, changes: list[str]) -> None:
    """Run one experiment, with this Python for the stages."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    dvc_exp = [sys.executable, "-m", "dvc", "exp"]
    # An earlier experiment of that name may have had other params; its results stay in the cache.
    subprocess.run([*dvc_exp, "remove", "--quiet", experiment], check=False, capture_output=True)
    command = [*dvc_exp, "run", "--temp", "--quiet", "--name", experiment]
    command += [part for change in changes for part in ("-S", change)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


if __name__ == "__main__":
    main()
