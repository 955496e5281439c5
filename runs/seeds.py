"""Repeat the graph over seeds as DVC experiments and print test accuracies, mean and spread.

    python runs/seeds.py elpv-image
    python runs/seeds.py elpv-group
    python runs/seeds.py hymenoptera --path FOLDER    # the one with train/ and val/
    python runs/seeds.py digits --path data/digits    # from runs/sets.py; others too
    python runs/seeds.py digits --path data/digits --set backbone.weights=none
    python runs/seeds.py mine --set prepare.source=folder --set prepare.path=data/mine

Each run is a `dvc exp run --temp` of the last commit: it doesn't change the workspace, its metrics
are stored under the experiment's name, and stages that ran before are taken from the cache. Each
run writes one line to results.csv, from which runs/known.py makes tables.
"""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import dvc.api
import yaml

from pipeline.commands.revision import MODELS

DIGITS = [
    *("prepare.source=folder", "prepare.split_by=image", "flips=none"),
    *("stage1.image_size=224", "stage2.image_size=224"),
]
# Thousands of images of 28 pixels a side.
SMALL = [
    *("prepare.source=folder", "prepare.split_by=image", "prepare.size=64"),
    *("extract.image_size=64", "stage1.image_size=64", "stage2.image_size=64"),
]
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
        # Some 200 images are too few to tune single layers: first the head, then all at a low rate.
        "stage1.unfreeze=[]",
        "stage1.image_size=288",
        "stage1.lr=1.0e-4",
        "stage2.image_size=288",
    ],
    # The recipe of PyTorch's tutorial on the same images: everything trains, from a random head.
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
        "stage1.keep=best",
        "stage1.average_epochs=0.0",
        "evaluate.views=1",
    ],
    # Images of 8 pixels a side: codes at 160 pixels are very different from codes at 224.
    "digits": DIGITS,
    "emoji": ["prepare.source=folder", "flips=horizontal"],
    "wafers": ["prepare.source=folder"],
    "fashion": [*SMALL, "flips=horizontal"],
    "mnist": [*SMALL, "flips=none"],
    # The same with few images to train on, and many to test.
    "elpv-few": ["prepare.test_fraction=0.8"],
    "digits-few": [*DIGITS, "prepare.test_fraction=0.85"],
    # By image: all of mono come from three modules, too few for three splits.
    "wafers-few": [
        *("prepare.source=folder", "prepare.split_by=image", "prepare.test_fraction=0.8"),
    ],
    "emoji-few": ["prepare.source=folder", "flips=horizontal", "prepare.test_fraction=0.8"],
}
EVIDENCE = ("images", "early", "late", "source_confidence", "source_information")
RESULTS = Path(__file__).with_name("results.csv")
GRAPH = Path(__file__).parent.parent / "dvc.yaml"


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
        said, row = accuracies(metrics)
        for name, value in row.items():
            found.setdefault(name, []).append(value)
        cells = (f"{k} {v:.4f}" for k, v in row.items())
        print(f"seed {seed}: {metrics['chosen']:>7} chosen", *cells, sep="  ", flush=True)
        if said == "test":
            keep(record(" ".join((options.name, *options.set)), seed, metrics))
    print(f"\n{options.name}, {len(options.seeds)} seeds: {said} accuracy")
    for name, values in found.items():
        spread = stdev(values) if len(values) > 1 else 0.0
        print(f"{name:<18} {mean(values):.4f} ± {spread:.4f}")


def accuracies(metrics: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Return the models' accuracies on test, or on validation if there are no test images."""
    test, chosen = metrics.get("test"), metrics["chosen"]  # DVC shows no empty metrics
    if not test:
        of = {m: metrics[f"models/{m}/metrics.json:{m}"] for m in ("probe", "stage1", "stage2")}
        return "validation", {model: found["val"]["accuracy"] for model, found in of.items()}
    row = {model: test[model]["accuracy"] for model in MODELS if model in test}
    row["chosen"] = test[chosen]["accuracy"]
    row["chosen, weighted"] = test[chosen]["accuracy_weighted"]
    row["probe, weighted"] = test["probe"]["accuracy_weighted"]
    return "test", row


def record(name: str, seed: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the advice and the results of one run, as a line of results.csv."""
    # Without pretrained weights there is no advice, and DVC shows no empty metrics.
    advice = metrics.get("advice", {"case": ""})
    test, gain = metrics["test"], metrics["stage2_minus_probe"]
    evidence = advice.get("evidence", dict.fromkeys(EVIDENCE, ""))
    stages = yaml.safe_load(GRAPH.read_text())["stages"]
    timing = (metrics.get(s) or metrics[f"models/{s}/timing.json:{s}"] for s in stages)
    return {
        "name": name,
        "seed": seed,
        **{model: test[model]["accuracy"] if model in test else "" for model in MODELS},
        "chosen": metrics["chosen"],
        **{f"gain_{k}": gain[k] for k in ("accuracy", "low", "high", "p_value")},
        "case": advice["case"],
        **{f"cv_{k}": advice.get(k, "") for k in ("probe_linear", "probe")},
        **{k: evidence[k] for k in EVIDENCE},
        "minutes": round(sum(t["seconds"] for t in timing) / 60, 1),
    }


def keep(line: dict[str, Any]) -> None:
    """Add a line to results.csv, replacing an earlier one of the same run."""
    lines = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    same = (line["name"], str(line["seed"]))
    lines = [old for old in lines if (old["name"], old["seed"]) != same]
    lines.append({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()})
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(lines, key=lambda old: (old["name"], int(old["seed"]))))


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
