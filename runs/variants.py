"""Run stages 1 and 2 with changed params over data sets and seeds, without DVC, and compare them.

    python -m runs.variants elpv-group clothing=FOLDER --seeds 5 6 7
    python -m runs.variants clothing:200=FOLDER --variant slow "stage1.lr=1e-4" --on test
    python -m runs.variants elpv-group --orders 0 50          # other order and augmentation
    PIPELINE_THREADS=1 python -m runs.variants elpv-group --variant one ""

A variant is a name and a list of params; the one called plain has none, and is always run. The
splits are those that a seed draws; an order is added to the seed of stages 1 and 2 alone.
clothing:200 draws 200 of the training images, and holds out others of them as the test split.

Each run is kept in a folder: what the stages say of themselves, and the scores of all models on
validation and test. What is there is not run again, so that a killed table goes on. Figures are of
validation, unless --on test: the test images of a whole set count once, when the choice is made.

Prints accuracies by set, with the interval of stage 2 minus the best probe over groups of images,
which several seeds may test; each variant's mean difference from plain over sets and seeds, with
the standard error over sets; and how much results differ between orders.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from pipeline.commands.table import aligned
from pipeline.final_model.candidates import BLEND, SINGLE, Scored, candidates_of, choose
from pipeline.images.shards import read_splits
from pipeline.inference.tta import TTA, logits
from pipeline.nets.device import set_up_torch
from pipeline.nets.network import load
from pipeline.scoring.metrics import validation
from pipeline.stage1 import stage1
from pipeline.stage2 import stage2
from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import load_yaml
from pipeline.statistics.significance import difference
from pipeline.statistics.verdict import TOO_FEW
from runs.trials import Trial, once, trained

PLAIN = "plain"
SPLITS = ("val", "test")
MODELS = (*SINGLE, BLEND, "chosen")
SECTIONS = ("augment", "stage1", "stage2", "evaluate")  # whose params a variant may change
KEPT = {  # of what a stage writes
    "probe": ("metrics.json", "grid.csv", "out_of_fold.csv"),
    "stage1": ("metrics.json", "history.csv"),
    "stage2": ("metrics.json", "history.csv", "interpolation.csv"),
}

Scores = dict[str, Any]  # arrays of a run's scores.npz


@dataclass(frozen=True)
class Run:
    """Stages 1 and 2 of a set with the splits of a seed."""

    trial: Trial
    seed: int
    order: int
    variant: str
    settings: str

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.trial.kept / f"run-{self.seed}-{self.order}-{self.variant}"

    def params(self) -> dict[str, Any]:
        """Return the set's params, changed by the variant's."""
        changed = with_settings(self.trial.params(), self.settings)
        return changed | {"seed": self.seed + self.order}


def main() -> None:
    """Run what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("sets", nargs="+", metavar="NAME[:IMAGES][=FOLDER]")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5, 10))
    parser.add_argument("--orders", type=int, nargs="+", default=[0])
    changed = ("NAME", "'KEY=VALUE ...'")
    parser.add_argument("--variant", nargs=2, action="append", default=[], metavar=changed)
    parser.add_argument(
        "--on", choices=("val", "test"), default="val", help="the split to count on"
    )
    parser.add_argument("--lanes", type=int, default=1, help="processes beside one another")
    parser.add_argument("--seconds", type=float, default=np.inf, help="no run starts after them")
    parser.add_argument("--keep", type=Path, default=Path("data/trials"), help="for finished parts")
    options = parser.parse_args()
    trials = [Trial.named(text, options.keep) for text in options.sets]
    variants = {PLAIN: "", **dict(options.variant)}
    runs = [
        Run(trial, seed, order, *variant)
        for variant in variants.items()
        for seed in options.seeds
        for order in options.orders
        for trial in trials
    ]
    for run in runs:
        run.params()  # refuses unknown ones before the first hour has passed
    finish(runs, options.lanes, time.time() + options.seconds)
    found = {run: read(run) for run in runs if run.folder.exists()}
    if len(found) < len(runs):
        say(f"{len(runs) - len(found)} of {len(runs)} runs were not started: run this again")
    apart = {name: {r: s for r, s in found.items() if r.variant == name} for name in variants}
    for name, of_one in apart.items():
        say(f"{name}, on {options.on}:")
        for line in aligned(table(of_one, options.on)):
            say(f"  {line}")
    for line in aligned(differences(found, options.on)) if len(variants) > 1 else ():
        say(line)
    for name, of_one in apart.items() if len(options.orders) > 1 else ():
        for line in changes(of_one, options.on):
            say(f"{name}: {line}")


def with_settings(params: dict[str, Any], settings: str) -> dict[str, Any]:
    """Change params by a list of KEY=VALUE."""
    for setting in settings.split():
        key, _, value = setting.partition("=")
        *sections, name = key.split(".")
        if not sections or sections[0] not in SECTIONS:
            raise SystemExit(f"--variant {setting}: only params of {', '.join(SECTIONS)}")
        place = params
        for section in sections:
            place = place[section]
        if name not in place:
            raise SystemExit(f"--variant {setting}: no such param")
        place[name] = load_yaml(value)
    return params


def finish(runs: Sequence[Run], lanes: int, until: float) -> None:
    """Run what is not there yet, in processes beside one another; none starts after a time."""
    missing = [run for run in runs if not run.folder.exists()]
    probed = list(dict.fromkeys((run.trial, run.seed) for run in missing))
    if lanes == 1:
        for trial, seed in probed:
            trial.probed(seed)
        for group in sharing(missing):
            say(finish_group(until, group))
        return
    with multiprocessing.get_context("spawn").Pool(lanes, _quiet) as pool:
        # What several share is made first: two processes must not make it at once.
        whole = list(dict.fromkeys((replace(trial, images=0), seed) for trial, seed in probed))
        for pairs in (whole, probed):
            list(pool.starmap(Trial.prepared, pairs, chunksize=1))
        uncoded = dict.fromkeys(t.whole() for t, seed in probed if not t.fitted(seed).exists())
        list(pool.imap_unordered(Trial.codes, uncoded))
        list(pool.starmap(Trial.probed, probed, chunksize=1))
        for said in pool.imap_unordered(partial(finish_group, until), sharing(missing)):
            say(said)


def _quiet() -> None:
    """Leave the terminal to the main process."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def sharing(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that have their stage 1 in common, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        others = [s for s in run.settings.split() if not s.startswith("stage2.")]
        groups.setdefault((run.trial, run.seed, run.order, *sorted(others)), []).append(run)
    return list(groups.values())


def finish_group(until: float, group: Sequence[Run]) -> str:
    """Run stage 1 once and stage 2 for each of the runs; return what to say of it."""
    one = group[0]
    names = ", ".join(run.variant for run in group)
    what = f"{one.trial.name}, seed {one.seed}, order {one.order}, {names}"
    start = time.time()
    if start > until:
        return f"{what}: not started"
    set_up_torch()
    prepared, probed = one.trial.prepared(one.seed), one.trial.probed(one.seed)
    try:
        with tempfile.TemporaryDirectory(dir=one.trial.kept) as folder:
            paths = {"prepared": prepared, "probe": probed / "probe.safetensors"}
            ones = trained(stage1, Path(folder), one.params(), **paths)
            scores = dict(np.load(probed / "scores.npz")) | _scored(ones, prepared, one.params())
            for run in group:
                make = partial(_finish, run, prepared, probed, ones, scores)
                once(run.folder, run.params(), make)
    except PipelineError as error:
        return f"{what}: failed: {error}"
    return f"{what}: {time.time() - start:.0f} s"


def _scored(stage: Path, prepared: Path, params: dict[str, Any]) -> Scores:
    """Score the network that a stage wrote, on validation and test."""
    network, _ = load(stage / "model.safetensors")
    tta = TTA(params["flips"], params["evaluate"]["views"])
    _, both = read_splits(prepared, SPLITS)
    pairs = zip(SPLITS, both, strict=True)
    return {f"{stage.name}-{split}": logits(network, images, tta) for split, images in pairs}


def _finish(run: Run, prepared: Path, probed: Path, ones: Path, scores: Scores, out: Path) -> None:
    """Run stage 2, and keep the results and scores of all models."""
    with tempfile.TemporaryDirectory(dir=run.trial.kept) as folder:
        paths = {"prepared": prepared, "stage1": ones / "model.safetensors"}
        twos = trained(stage2, Path(folder), run.params(), **paths)
        scores = scores | _scored(twos, prepared, run.params())
        for name, at in {"probe": probed, "stage1": ones, "stage2": twos}.items():
            for file in KEPT[name]:
                shutil.copy(at / file, out / f"{name}-{file}")
    for split, rows in zip(SPLITS, read_splits(prepared, SPLITS)[0], strict=True):
        of_rows = {"labels": rows.labels, "groups": rows.groups, "weights": rows.weights}
        scores |= {f"{name}-{split}": array for name, array in of_rows.items()}
    np.savez_compressed(out / "scores.npz", **scores)


def read(run: Run) -> Scores:
    """Read a run's scores, and what evaluate would make of them: the blend and the final model."""
    folder = once(run.folder, run.params(), lambda out: None)  # refuses one of other params
    arrays = dict(np.load(folder / "scores.npz"))
    whole, none = run.params(), TTA("none", 1)
    params = whole["evaluate"]
    models = [
        Scored(name, None, None, none, arrays[f"{name}-val"], arrays[f"{name}-test"], {})
        for name in SINGLE
    ]
    truth = arrays["labels-val"], arrays["groups-val"]
    found = candidates_of(models, params["candidates"], *truth)
    chosen = choose(found, params["candidates"], *truth, params["tie"], whole["measure"])
    of_models = {**found, "chosen": chosen}
    return arrays | {
        f"{name}-{split}": getattr(of_models[name], split) for name in MODELS for split in SPLITS
    }


def _accuracy(scores: Scores, model: str, on: str, of: int = 1) -> float:
    return of * float((scores[f"{model}-{on}"].argmax(1) == scores[f"labels-{on}"]).mean())


def _loss(scores: Scores, model: str, on: str) -> float:
    return validation(scores[f"{model}-{on}"], scores[f"labels-{on}"])["loss"]


def table(found: dict[Run, Scores], on: str) -> list[list[str]]:
    """Return a row for each set, with means over its runs, and one for the mean over the sets."""
    lines = [["set", "runs", *MODELS, "stage 2 - probe", "95 % interval"]]
    of_sets = []
    for name in dict.fromkeys(run.trial.name for run in found):
        scores = [s for run, s in found.items() if run.trial.name == name]
        means = [mean(_accuracy(s, m, on) for s in scores) for m in MODELS]
        right = {
            m: np.concatenate([s[f"{m}-{on}"].argmax(1) == s[f"labels-{on}"] for s in scores])
            for m in ("stage2", "probe")
        }
        groups = np.concatenate([s[f"groups-{on}"] for s in scores])
        gap = difference(right["stage2"], right["probe"], groups)
        low, high, said = gap["low"], gap["high"], TOO_FEW
        if low is not None and high is not None:
            said = f"{100 * low:+.1f} to {100 * high:+.1f}"
        of_sets.append([*means, means[MODELS.index("stage2")] - means[0]])
        lines.append([name, str(len(scores)), *_cells(of_sets[-1]), said])
    if len(of_sets) > 1:
        columns = list(zip(*of_sets, strict=True))
        error = 100 * stdev(columns[-1]) / len(of_sets) ** 0.5
        cells = _cells([mean(c) for c in columns])
        lines.append(["mean", str(len(found)), *cells, f"± {error:.2f} (standard error, sets)"])
    return lines


def _cells(figures: Sequence[float]) -> list[str]:
    """Format accuracies and, last, a difference of accuracies."""
    return [*(f"{a:.4f}" for a in figures[:-1]), f"{100 * figures[-1]:+.2f}"]


def differences(found: dict[Run, Scores], on: str) -> list[list[str]]:
    """Return a row for each variant: differences from plain in points and in nats."""
    figures: dict[str, Callable[[Scores], float]] = {}
    for model in MODELS[1:]:
        figures[f"{model}, points"] = partial(_accuracy, model=model, on=on, of=100)
        figures[f"{model}, log loss"] = partial(_loss, model=model, on=on)
    lines = [["minus plain", "sets", "runs", *figures]]
    for name in dict.fromkeys(run.variant for run in found if run.variant != PLAIN):
        pairs = [
            (run.trial.name, scores, found[plain])
            for run, scores in found.items()
            if run.variant == name and (plain := replace(run, variant=PLAIN, settings="")) in found
        ]
        sets = list(dict.fromkeys(of for of, _, _ in pairs))
        cells = []
        for figure, of in figures.items():
            gaps = [mean(of(a) - of(b) for s, a, b in pairs if s == one) for one in sets]
            digits = 2 if figure.endswith("points") else 4
            error = f" ± {stdev(gaps) / len(gaps) ** 0.5:.{digits}f}" if len(gaps) > 1 else ""
            cells.append(f"{mean(gaps):+.{digits}f}{error}" if gaps else "-")
        lines.append([name, str(len(sets)), str(len(pairs)), *cells])
    return lines


def changes(found: dict[Run, Scores], on: str) -> list[str]:
    """Describe how far accuracies and answers differ between two orders of a set and seed."""
    by: dict[tuple[str, int], list[Scores]] = {}
    for run, scores in found.items():
        by.setdefault((run.trial.name, run.seed), []).append(scores)
    pairs = [pair for of_one in by.values() for pair in combinations(of_one, 2)]
    lines = []
    for model in MODELS if pairs else ():
        gaps = [100 * abs(_accuracy(a, model, on) - _accuracy(b, model, on)) for a, b in pairs]
        key = f"{model}-{on}"
        others = [100 * float((a[key].argmax(1) != b[key].argmax(1)).mean()) for a, b in pairs]
        lines.append(
            f"{model}: mean absolute change {mean(gaps):.2f} points (largest {max(gaps):.2f}, "
            f"{len(pairs)} pairs), {mean(others):.1f} % other answers"
        )
    return lines


if __name__ == "__main__":
    main()
