"""Compare runs, and report which differences are more than noise.

    python -m pipeline compare                    # the last commit and the working tree
    python -m pipeline compare main exp-a exp-b   # commits, branches, tags or DVC's experiments
    python -m pipeline compare . main --json      # . is the working tree
    python -m pipeline compare --experiments      # the last commit, and all experiments on it
    python -m pipeline compare main best --test   # once, at the end

Runs are not compared on the test images: stages 1 and 2 are compared on the validation images, the
probes on their out-of-fold predictions for the training images. If a model is chosen by its test
accuracy, that accuracy is too high, so use `--test` only after the choice is made.

All runs are compared with the first one: image by image if both have predictions for the same
images and DVC's cache holds these; otherwise by their accuracies alone, which can't be
distinguished from noise. Runs that differ only in `seed` are shown as mean and standard deviation,
and compared as re-splits of one data set. P-values of several comparisons are raised by Holm's
method (Holm 1979).

Runs that differ only in `prepare.test_fold` test different images with one procedure. With `--test`
their answers are put together into one accuracy with one interval, and two such sets of runs are
compared image by image.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean, stdev

from pipeline.commands.differences import Against, corrected, interval, paired, said
from pipeline.commands.finished import (
    ANSWERS,
    SPLIT_OF,
    Judge,
    Run,
    alike_but_for,
    changed,
    models_of,
    read,
)
from pipeline.commands.folds import differences_of, folds_of, of_folds, pooled
from pipeline.commands.revision import HERE, MODELS, SHOWN, experiments, note
from pipeline.commands.table import aligned
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.scoring.metrics import MEASURES
from pipeline.stage_runtime.progress import say
from pipeline.statistics.significance import over_resplits
from pipeline.statistics.verdict import interval_in_words

MANY = 4  # from this number of runs on, each has a line
COST = (
    "compared on the test images: if you choose a model by its test accuracy, that accuracy is too "
    "high; choose by validation (without --test), and use --test once"
)


def against(run: Run, base: Run, judge: Judge = "validation") -> Iterator[Against]:
    """Compare each model of a run with the same model of another, without correction."""
    for model in (m for m in MODELS if m in run.accuracies and m in base.accuracies):
        kinds = ("out-of-fold", "validation") if judge == "validation" else ("test",)
        both = [
            (kind, run.right[kind][model], base.right[kind][model])
            for kind in kinds
            if all(model in side.right.get(kind, {}) for side in (run, base))
        ]
        same = [found for found in both if found[1] and found[1].keys() == found[2].keys()]
        if not same:
            apart = run.accuracies[model] - base.accuracies[model]
            why = f"other {ANSWERS[judge][1]}" if both else "accuracies alone"
            yield Against(model, run.name, base.name, apart, None, None, None, why)
            continue
        kind, ours, theirs = same[0]
        yield paired(model, (run.name, ours), (base.name, theirs), run.groups, ANSWERS[kind][1])


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Group the runs that differ only in their seed."""
    return alike_but_for("seed", runs)


def table(runs: Sequence[Run], judge: Judge = "validation") -> list[str]:
    """Return a table of the runs' accuracies; for many runs, one line each without intervals."""
    title, models = f"{judge} accuracy", models_of(runs)
    if len(runs) >= MANY:
        lines = [[title, *models, "chosen", f"against {runs[0].name}"]]
        for run in runs:
            found = (run.accuracies.get(model) for model in models)
            accuracies = ["-" if a is None else f"{a:.4f}" for a in found]
            lines.append([run.name, *accuracies, run.chosen, ", ".join(changed(run, runs[0]))])
        return aligned(lines)
    rows = [[title, *(run.name for run in runs)]]
    rows += [[model, *(_with_interval(run, model, judge) for run in runs)] for model in models]
    rows.append(["chosen", *(run.chosen for run in runs)])
    for name in dict.fromkeys(name for run in runs for name in run.measured):
        rows.append([f"its {MEASURES[name]}", *(run.measured.get(name, "-") for run in runs)])
    return aligned(rows)


def _with_interval(run: Run, model: str, judge: Judge) -> str:
    if model not in run.accuracies:
        return "-"
    said = f"{run.accuracies[model]:.4f}"
    right = run.right.get(judge, {}).get(model, {})
    if not right:
        return said
    return f"{said} ({interval_in_words(*interval(right, run.groups))})"


def of_seeds(groups: Sequence[Sequence[Run]], judge: Judge = "validation") -> list[Against]:
    """Compare each group's final models with the first group's, paired by the seeds they share.

    Other seeds draw other splits of the same images: see `over_resplits`.
    """
    base, *others = groups
    found = []
    for group in others:
        sides = [{r.params.get("seed"): r for r in side if r.accuracies} for side in (group, base)]
        shared = [seed for seed in sides[0] if seed in sides[1]]
        paired = len(shared) > 1
        if paired:
            sides = [{seed: side[seed] for seed in shared} for side in sides]
        a, b = ([_accuracy(run, "chosen") for run in side.values()] for side in sides)
        images = group[0].images
        if not a or not b or not images:
            continue
        tested = over_resplits(a, b, images[SPLIT_OF[judge]] / images["train"], paired)
        low, high, p = tested or (None, None, None)
        on = f"{len(a)} seeds" if paired else f"{len(a)} and {len(b)} seeds"
        apart = mean(a) - mean(b)
        found.append(Against("chosen", group[0].name, base[0].name, apart, low, high, p, on))
    return found


def seeds(groups: Sequence[Sequence[Run]], found: Sequence[Against]) -> list[str]:
    """Return each group's means and standard deviations over its seeds, one line per group."""
    base, models = groups[0][0], models_of([run for group in groups for run in group])
    rows = [["over seeds", "n", *models, "chosen", "", ""]]
    for group in groups:
        judged = [run for run in group if run.accuracies]
        values = [
            [_accuracy(run, model) for run in judged if model in ("chosen", *run.accuracies)]
            for model in (*models, "chosen")
        ]
        params = [said for said in changed(group[0], base) if not said.startswith("seed ")]
        told = [one for one in found if one.run == group[0].name and one.p_value is not None]
        p = [f"p = {o.p_value:.3f}: {o.verdict}" for o in told]
        spread = [_spread(of_model) for of_model in values]
        said = ", ".join(params) or f"as {base.name}"
        rows.append(["", str(len(judged)), *spread, "".join(p), said])
    return aligned(rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def _accuracy(run: Run, model: str) -> float:
    return run.accuracies[run.chosen if model == "chosen" else model]


def main() -> None:
    """Print the comparison on the terminal."""
    parser = parser_of("compare", __doc__ or "")
    parser.add_argument("revisions", nargs="*", metavar="REV", help="(default: HEAD and .)")
    parser.add_argument("--experiments", action="store_true", help="add those on the last commit")
    parser.add_argument("--test", action="store_true", help="use the test images, at the end")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    judge: Judge = "test" if options.test else "validation"
    with one_line_errors():
        if options.experiments:
            options.revisions = [*(options.revisions or ["HEAD"]), *experiments()]
        if options.test:
            note(COST)
        runs = [read(revision, judge) for revision in options.revisions or ("HEAD", HERE)]
        base, *others = runs
        groups = by_seed(runs)
        several = any(len(group) > 1 for group in groups) and len({r.name for r in runs}) > 2
        by_image = [one for run in others for one in against(run, base, judge)]
        over_seeds = of_seeds(groups, judge) if several else []
        all_folds = folds_of(runs)
        over_folds = of_folds(all_folds) if options.test else []
        found = corrected([*by_image, *over_seeds, *over_folds])
        ends = len(by_image), len(by_image) + len(over_seeds)
        by_image, over_seeds = found[: ends[0]], found[ends[0] : ends[1]]
        over_folds = found[ends[1] :]
        if options.json:
            judged = {r.name: {"chosen": r.chosen, "accuracy": r.accuracies} for r in runs}
            comparisons = [{**asdict(one), "noise": one.noise} for one in found]
            all_of_it = {"judged_by": judge, "runs": judged, "against": comparisons}
            if options.test and all_folds:
                all_of_it["folds"] = [folds.facts() for folds in all_folds]
            print(json.dumps(all_of_it, indent=2))
            return
        for line in (*table(runs, judge), *_differences(runs, by_image)):
            say(line)
        if several:
            say("")
            for line in seeds(groups, over_seeds):
                say(line)
        if all_folds and options.test:
            say("")
            for line in (*pooled(all_folds), *differences_of(all_folds, over_folds)):
                say(line)
        elif all_folds:
            note("these are folds of one data set: --test puts their test images together")


def _differences(runs: Sequence[Run], found: Sequence[Against]) -> Iterator[str]:
    """Describe how the runs differ from the first; for many, only what is more than noise."""
    base, *others = runs
    if len(runs) >= MANY:
        clear = [one for one in found if one.noise is False]
        yield f"\nof {len(found)} comparisons with {base.name}, more than noise: {len(clear)}"
        width = max(len(run.name) for run in runs)
        yield from (f"{one.run:<{width}}  {said(one)}" for one in clear)
        if untold := sum(one.noise is None for one in found):
            yield f"{untold} can't be distinguished from noise: other images, or accuracies alone"
        return
    for run in others:
        params = ", ".join(changed(run, base)) or "same params"
        yield f"\n{run.name} against {base.name}: {params}"
        stale = (one for one in (base, run) if one.stale)
        yield from (f"{one.name} ran with {', '.join(one.stale[:SHOWN])}" for one in stale)
        yield from (said(one) for one in found if one.run == run.name)
