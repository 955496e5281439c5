"""Run all stages over data sets and seeds, without DVC, and print test accuracies.

    python -m runs.full elpv-group clothing=FOLDER --seeds 5 6 7
    python -m runs.full elpv-group --as order --order 50      # other order and augmentation
    python -m runs.full elpv-group --as light --set augment.light=0.3 --against plain
    PIPELINE_THREADS=1 python -m runs.full elpv-group --as one --against two

Each run is kept in a folder: what the stages say of themselves, and the scores of all models on
validation and test. Runs that are there are not run again, so that a killed table goes on, and runs
of one set and seed share the packed images, the codes and the probe. The splits are those that the
seed draws; with --order, stages 1 and 2 get another seed. With --as, runs under other circumstances
have a name, and --against compares them by set and seed.

The interval of a difference is over groups of images, which several seeds may test. Test images
count here: choose by `runs.screen` first.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from pipeline.commands.table import aligned
from pipeline.evaluate import evaluate
from pipeline.final_model.candidates import scored
from pipeline.images.shards import read_facts, read_splits
from pipeline.stage_runtime.files import write_json
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import arguments
from pipeline.statistics.significance import difference
from pipeline.statistics.verdict import TOO_FEW
from runs.screen import changed
from runs.trials import Trial, fine_tuned, once

SCORED = ("probe", "stage1", "stage2")
MODELS = (*SCORED, "chosen")
AFTER = ("augment", "stage1", "stage2", "evaluate")  # sections that --set may change
KEPT = {
    "probe": ("metrics.json", "grid.csv", "out_of_fold.csv"),
    "stage1": ("metrics.json", "history.csv"),
    "stage2": ("metrics.json", "history.csv", "interpolation.csv"),
    "report": ("metrics.json", "validation.csv", "predictions.csv"),
}


def main() -> None:
    """Run what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("sets", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5, 10))
    parser.add_argument("--order", type=int, default=0, help="added to the seed of stages 1 and 2")
    parser.add_argument("--set", default="", metavar="'KEY=VALUE ...'", help="after the probe")
    parser.add_argument("--as", dest="name", default="plain", help="a name for these runs")
    parser.add_argument("--against", help="the name of runs to compare with")
    parser.add_argument("--keep", type=Path, default=Path("data/trials"), help="for finished runs")
    options = parser.parse_args()
    trials = [Trial.named(text, options.keep) for text in options.sets]
    runs = [
        (trial, seed, finished(trial, seed, options.name, options.order, options.set))
        for seed in options.seeds
        for trial in trials
    ]
    for line in aligned(table([(trial.name, folder) for trial, _, folder in runs])):
        say(line)
    if options.against:
        pairs = [(f, place(trial, seed, options.against)) for trial, seed, f in runs]
        for line in changes([(a, b) for a, b in pairs if b.exists()]):
            say(line)


def place(trial: Trial, seed: int, name: str) -> Path:
    """Return the folder of one run."""
    return trial.keep / trial.name / f"full-{seed}-{name}"


def finished(trial: Trial, seed: int, name: str, order: int, settings: str) -> Path:
    """Run all stages of a set with the splits of a seed, if that hasn't been done."""
    return once(place(trial, seed, name), lambda out: _run(trial, seed, order, settings, out))


def _run(trial: Trial, seed: int, order: int, settings: str, out: Path) -> None:
    for setting in settings.split():
        if setting.partition(".")[0] not in AFTER:
            raise SystemExit(f"--set {setting}: only params of {', '.join(AFTER)}")
    params = changed(trial.params() | {"seed": seed}, settings)
    prepared = trial.prepared(seed)
    features = trial.features(params["backbone"]["name"], seed)
    probed = trial.probed(params["backbone"]["name"], seed)
    with tempfile.TemporaryDirectory(dir=trial.keep) as folder:
        fitted, report = probed / "probe.safetensors", Path(folder) / "report"
        final, advice = Path(folder) / "final", Path(folder) / "advice.json"
        trained = params | {"seed": seed + order}
        ones, twos = fine_tuned(prepared, fitted, trained, Path(folder))
        one, two = (stage / "model.safetensors" for stage in (ones, twos))
        for made in (report, final):
            made.mkdir()
        write_json(advice, {"advice": {"expected_gain": None}})
        state = Resume(Path(folder) / "state")
        paths: dict[str, Any] = {
            "prepared": prepared,
            "features": features,
            "probe": fitted,
            "advice": advice,
        }
        paths |= {"stage1": one, "stage2": two, "out": report, "final": final}
        evaluate(**paths, **arguments(evaluate, params), resume=state)
        at = {"probe": probed, "stage1": ones, "stage2": twos, "report": report}
        for name, files in KEPT.items():
            for file in files:
                shutil.copy(at[name] / file, out / f"{name}-{file}")
        # From evaluate's own state: the networks' scores are not computed again.
        _keep_scores(prepared, features, fitted, (one, two), params, state, out)


def _keep_scores(
    prepared: Path,
    features: Path,
    fitted: Path,
    stages: tuple[Path, Path],
    params: dict[str, Any],
    state: Resume,
    out: Path,
) -> None:
    both = read_splits(prepared, ("val", "test"))
    classes, views = read_facts(prepared).classes, params["evaluate"]["views"]
    models = scored(both[1], features, fitted, stages, views, classes, state)
    arrays = {f"{m.name}-{s}": getattr(m, s) for m in models for s in ("val", "test")}
    for split, rows in zip(("val", "test"), both[0], strict=True):
        arrays |= {f"labels-{split}": rows.labels, f"groups-{split}": rows.groups}
        arrays |= {f"weights-{split}": rows.weights}
    np.savez_compressed(out / "scores.npz", **arrays)


def table(runs: Sequence[tuple[str, Path]]) -> list[list[str]]:
    """Return a row for each set, with means over seeds, and one for the mean over the sets."""
    lines = [["set", "runs", *MODELS, "stage 2 - probe", "95 % interval"]]
    of_sets: list[list[float]] = []
    for name in dict.fromkeys(name for name, _ in runs):
        folders = [folder for of, folder in runs if of == name]
        found = [_accuracies(folder) for folder in folders]
        means = [mean(run[m] for run in found) for m in MODELS]
        right, groups = _answers(folders)
        gap = difference(right["stage2"], right["probe"], groups)
        of_sets.append([*means, mean(run["stage2"] - run["probe"] for run in found)])
        low, high = gap["low"], gap["high"]
        said = TOO_FEW
        if low is not None and high is not None:
            said = f"{100 * low:+.1f} to {100 * high:+.1f}"
        cells = [*(f"{m:.4f}" for m in means), f"{100 * of_sets[-1][-1]:+.2f}"]
        lines.append([name, str(len(found)), *cells, said])
    if len(of_sets) > 1:
        columns = list(zip(*of_sets, strict=True))
        error = 100 * stdev(columns[-1]) / len(of_sets) ** 0.5
        cells = [*(f"{mean(c):.4f}" for c in columns[:-1]), f"{100 * mean(columns[-1]):+.2f}"]
        lines.append(["mean", str(len(runs)), *cells, f"± {error:.2f} (standard error, sets)"])
    return lines


def _accuracies(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "report-metrics.json").read_text())
    found = {model: metrics["test"][model]["accuracy"] for model in SCORED}
    return {**found, "chosen": found[metrics["chosen"]]}


def _answers(folders: Sequence[Path]) -> tuple[dict[str, Any], Any]:
    """Return which test images of several runs the models classify right, and their groups."""
    arrays = [np.load(folder / "scores.npz") for folder in folders]
    right = {
        m: np.concatenate([a[f"{m}-test"].argmax(1) == a["labels-test"] for a in arrays])
        for m in SCORED
    }
    return right, np.concatenate([a["groups-test"] for a in arrays])


def changes(pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """Describe how far the models' test accuracies and answers differ between pairs of runs."""
    found = [(_accuracies(one), _accuracies(other)) for one, other in pairs]
    lines = []
    for model in MODELS if found else ():
        gaps = [100 * abs(a[model] - b[model]) for a, b in found]
        points = f"{mean(gaps):.2f} points (largest {max(gaps):.2f}, {len(gaps)} pairs)"
        lines.append(f"{model}: mean absolute change of test accuracy {points}")
    for model in SCORED[1:] if found else ():
        answers = [[np.load(f / "scores.npz")[f"{model}-test"].argmax(1) for f in p] for p in pairs]
        other = mean(float((one != two).mean()) for one, two in answers)
        lines.append(f"{model}: {100 * other:.1f} % of the test images get another answer")
    return lines


if __name__ == "__main__":
    main()
