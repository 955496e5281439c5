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
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, stdev
from typing import Any, Literal

from pipeline.commands.differences import Against, corrected, interval, paired
from pipeline.commands.revision import (
    BLEND,
    HERE,
    MODELS,
    OUT_OF_FOLD,
    SHOWN,
    Text,
    experiments,
    files_of,
    images_of,
    note,
    right_of,
    shown,
    stale,
)
from pipeline.commands.table import aligned
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import flat, load_yaml
from pipeline.statistics.significance import over_resplits
from pipeline.statistics.verdict import interval_in_words

Judge = Literal["validation", "test"]
REPORT = "models/report/metrics.json"
# The predictions for each kind of images, and the name of these images.
ANSWERS = {
    "out-of-fold": (OUT_OF_FOLD, "training images, out of fold"),
    "validation": ("models/report/validation.csv", "validation images"),
    "test": ("models/report/predictions.csv", "test images"),
}
SPLIT_OF = {"validation": "val", "test": "test"}  # as index.csv and metrics.json call them
MANY = 4  # from this number of runs on, each has a line
COST = (
    "compared on the test images: if you choose a model by its test accuracy, that accuracy is too "
    "high; choose by validation (without --test), and use --test once"
)


@dataclass(frozen=True)
class Run:
    """The results of a finished run."""

    name: str
    params: dict[str, Any]  # flat
    chosen: str
    accuracies: dict[str, float]  # of each model, on the images to compare on; empty without any
    # By kind of images and model: whether each image (path and content) is classified correctly.
    right: dict[str, dict[str, dict[str, bool]]]
    groups: dict[str, int] = field(default_factory=dict)  # by image
    images: dict[str, int] = field(default_factory=dict)  # by split
    stale: list[str] = field(default_factory=list)  # params it ran with, if params.yaml has others


def read(revision: str, judge: Judge = "validation") -> Run:
    """Read the run of a revision, or of the working tree.

    Raises RunError if there is none.
    """
    with files_of(revision) as text:
        report = json.loads(text(REPORT))
        params = dict(flat(load_yaml(text("params.yaml"))))
        tested = report[SPLIT_OF[judge]]
        run = Run(
            shown(revision),
            params,
            report["chosen"],
            {m: v["accuracy"] if judge == "test" else v for m, v in tested.items()},
            {},
            stale=stale(revision, params, text),
        )
        return _with_answers(run, text, judge)


def _with_answers(run: Run, text: Text, judge: Judge) -> Run:
    """Add the predictions of a run's models, as far as DVC's cache has them."""
    images = images_of(run.name, text)
    kinds = ("test",) if judge == "test" else ("out-of-fold", "validation")
    found = {kind: right_of(run.name, text, ANSWERS[kind][0], images) for kind in kinds}
    return replace(
        run,
        right={kind: right for kind, right in found.items() if right is not None},
        groups={image.key: image.group for image in images.values()},
        images=dict(Counter(image.split for image in images.values())),
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
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.params.items() if key != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def changed(run: Run, base: Run) -> list[str]:
    """Describe which params differ, the old value first."""
    keys = [key for key in {**base.params, **run.params} if _value(base, key) != _value(run, key)]
    said = [f"{key} {_value(base, key)} → {_value(run, key)}" for key in keys]
    return said if len(said) <= SHOWN else [*said[:SHOWN], f"and {len(said) - SHOWN} more"]


def _value(run: Run, key: str) -> str:
    return json.dumps(run.params[key], default=str) if key in run.params else "none"


def table(runs: Sequence[Run], judge: Judge = "validation") -> list[str]:
    """Return a table of the runs' accuracies; for many runs, one line each without intervals."""
    title, models = f"{judge} accuracy", _models(runs)
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
    return aligned(rows)


def _models(runs: Iterable[Run]) -> list[str]:
    """Return the models to compare; earlier runs have no blend."""
    blended = any(BLEND in run.accuracies for run in runs)
    return [model for model in MODELS if blended or model != BLEND]


def _with_interval(run: Run, model: str, judge: Judge) -> str:
    if model not in run.accuracies:
        return "-"
    said = f"{run.accuracies[model]:.4f}"
    right = run.right.get(judge, {}).get(model, {})
    if not right:
        return said
    return f"{said} ({interval_in_words(*interval(right, run.groups))})"


def said(one: Against) -> str:
    """Describe a comparison in a line."""
    points = f"{one.model:<13} {100 * one.accuracy:+5.1f} points "
    if one.low is None or one.high is None or one.p_value is None:
        return f"{points}({one.on}): {one.verdict}"
    ends = f"{100 * one.low:+.1f} to {100 * one.high:+.1f}; p = {one.p_value:.3f}"
    return f"{points}({ends}; {one.on}): {one.verdict}"


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
    base, models = groups[0][0], _models([run for group in groups for run in group])
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
        found = corrected([*by_image, *over_seeds])
        by_image, over_seeds = found[: len(by_image)], found[len(by_image) :]
        if options.json:
            judged = {r.name: {"chosen": r.chosen, "accuracy": r.accuracies} for r in runs}
            comparisons = [{**asdict(one), "noise": one.noise} for one in found]
            all_of_it = {"judged_by": judge, "runs": judged, "against": comparisons}
            print(json.dumps(all_of_it, indent=2))
            return
        for line in (*table(runs, judge), *_differences(runs, by_image)):
            say(line)
        if several:
            say("")
            for line in seeds(groups, over_seeds):
                say(line)


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
