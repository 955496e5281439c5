"""Put runs side by side, and say which differences are more than noise.

    python -m pipeline.compare                    # the last commit, and what lies here
    python -m pipeline.compare main exp-a exp-b   # commits, branches, tags or DVC's experiments
    python -m pipeline.compare . main --json      # . is what lies here
    python -m pipeline.compare --experiments      # the last commit, and all experiments on it

The first run is what the others are compared with: image by image where both were tested on the
same ones and DVC's cache has what they said (a permutation test over groups of images), else by
their intervals alone. Runs that differ in nothing but `seed` are put together as their mean and
standard deviation. With several comparisons at once, p-values are raised by Holm's method (Holm
1979).
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.stats import ttest_ind

from pipeline.errors import PipelineError
from pipeline.learn.verdict import difference
from pipeline.progress import say
from pipeline.stage import Loader, flat, one_line_errors, parser_of
from pipeline.table import aligned

HERE = "."
REPORT = "models/report/metrics.json"
PREDICTIONS = "models/report/predictions.csv"
INDEX = "data/prepared/index.csv"
MODELS = ("probe_linear", "probe", "stage1", "stage2")
NOISE = 0.05  # p from which a difference counts as noise
SHOWN = 8  # changed params that are named
MANY = 4  # runs from which on each has a line


class RunError(PipelineError):
    """A revision holds no finished run, or its files aren't here."""


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    name: str
    params: dict[str, Any]  # flat
    chosen: str
    test: dict[str, dict[str, Any]]  # a model's test metrics; empty without a test split
    right: dict[str, dict[str, bool]]  # by model and image
    groups: dict[str, int]  # by image


@dataclass(frozen=True)
class Against:
    """How a model of one run does against the same of another."""

    model: str
    run: str
    base: str
    accuracy: float  # the difference
    low: float
    high: float
    p_value: float | None  # none where they were tested on other images
    noise: bool


def read(revision: str) -> Run:
    """Read a run of a revision, or of the folder itself.

    Raises RunError if there is none.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    files: DVCFileSystem | None = None

    def text(path: str) -> str:
        if files is None:
            return Path(path).read_text(encoding="utf-8")
        return str(files.read_text(path, encoding="utf-8"))

    try:
        if revision != HERE:
            files = DVCFileSystem(".", rev=revision)
        report = json.loads(text(REPORT))
        params = dict(flat(yaml.load(text("params.yaml"), Loader)))  # noqa: S506, a SafeLoader
    except FileNotFoundError as error:
        path = error.filename or str(error)
        raise RunError(f"{revision}: no {path} there; run `dvc repro`, and commit") from None
    except (DvcException, SCMError, ValueError) as error:
        raise RunError(f"{revision}: no run to read ({' '.join(str(error).split())})") from None
    images: dict[str, tuple[str, int]] = {}
    predictions: list[dict[str, str]] = []
    try:
        predictions = list(csv.DictReader(io.StringIO(text(PREDICTIONS))))
        for row in csv.DictReader(io.StringIO(text(INDEX))):
            images[row["path"]] = f"{row['path']} {row['sha256']}", int(row["group"])
    except Exception:  # each layer of DVC has its own for what isn't in the cache
        line = f"{revision}: its predictions aren't here (`dvc fetch` may have them)"
        print(line, file=sys.stderr)
        images, predictions = {}, []
    return Run(
        "here" if revision == HERE else revision,
        params,
        report["chosen"],
        report["test"],
        {
            model: {images[row["path"]][0]: row[model] == row["label"] for row in predictions}
            for model in report["test"]
        },
        dict(images.values()),
    )


def against(run: Run, base: Run) -> Iterator[Against]:
    """Compare each model of a run with the same of another, as if it were the only comparison."""
    for model in (m for m in MODELS if m in run.test and m in base.test):
        ours, theirs = run.right[model], base.right[model]
        if ours and ours.keys() == theirs.keys():
            images = sorted(ours)
            groups = np.array([run.groups[image] for image in images])
            found = difference(_of(ours, images), _of(theirs, images), groups, seed=0)
            low, high, p = found["low"], found["high"], found["p_value"]
            yield Against(model, run.name, base.name, found["accuracy"], low, high, p, p >= NOISE)
        else:
            one, other = run.test[model], base.test[model]
            gap = one["accuracy"] - other["accuracy"]
            # Two samples: the intervals' arms add up in squares.
            below = _arm(one, "low", other, "high")
            above = _arm(one, "high", other, "low")
            inside = gap - below <= 0 <= gap + above
            yield Against(model, run.name, base.name, gap, gap - below, gap + above, None, inside)


def _of(right: dict[str, bool], images: Sequence[str]) -> NDArray[np.bool_]:
    return np.array([right[image] for image in images])


def _arm(one: dict[str, Any], side: str, other: dict[str, Any], other_side: str) -> float:
    arms = (m["accuracy"] - m[f"accuracy_{s}"] for m, s in ((one, side), (other, other_side)))
    return float(np.hypot(*arms))


def holm(p_values: Sequence[float]) -> list[float]:
    """Raise p-values for being one of several (Holm 1979, Scandinavian Journal of Statistics 6)."""
    raised, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        raised[i] = highest
    return raised


def corrected(found: Sequence[Against]) -> list[Against]:
    """Raise the p-values of comparisons that are made at once."""
    tested = [one.p_value for one in found if one.p_value is not None]
    raised = iter(holm(tested))
    p_values = [None if one.p_value is None else next(raised) for one in found]
    return [
        one if p is None else replace(one, p_value=p, noise=p >= NOISE)
        for one, p in zip(found, p_values, strict=True)
    ]


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Put runs together that differ in nothing but their seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.params.items() if key != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def changed(run: Run, base: Run) -> list[str]:
    """Say which params differ, the old value first."""
    keys = [key for key in {**base.params, **run.params} if _value(base, key) != _value(run, key)]
    said = [f"{key} {_value(base, key)} → {_value(run, key)}" for key in keys]
    return said if len(said) <= SHOWN else [*said[:SHOWN], f"and {len(said) - SHOWN} more"]


def _value(run: Run, key: str) -> str:
    return json.dumps(run.params[key], default=str) if key in run.params else "none"


def experiments() -> list[str]:
    """Name DVC's experiments on the last commit."""
    from dvc.repo import Repo

    found = [name for names in Repo().experiments.ls().values() for name, _ in names]
    if not found:
        raise RunError("no experiments on the last commit; `dvc exp run` makes some")
    return sorted(found)


def table(runs: Sequence[Run]) -> list[str]:
    """Lay the runs' test accuracies out side by side; of many, a line each without intervals."""
    if len(runs) >= MANY:
        lines = [["test accuracy", *MODELS, "chosen", f"against {runs[0].name}"]]
        for run in runs:
            accuracies = [f"{run.test[m]['accuracy']:.4f}" if run.test else "-" for m in MODELS]
            lines.append([run.name, *accuracies, run.chosen, ", ".join(changed(run, runs[0]))])
        return aligned(lines)
    rows = [["test accuracy", *(run.name for run in runs)]]
    for model in MODELS:
        cells = [
            f"{m['accuracy']:.4f} ({m['accuracy_low']:.3f} to {m['accuracy_high']:.3f})"
            if (m := run.test.get(model))
            else "-"
            for run in runs
        ]
        rows.append([model, *cells])
    rows.append(["chosen", *(run.chosen for run in runs)])
    return aligned(rows)


def said(one: Against) -> str:
    """Say a comparison in a line."""
    p = "by their intervals" if one.p_value is None else f"p = {one.p_value:.3f}"
    verdict = "no more than noise" if one.noise else "more than noise"
    return (
        f"{one.model:<13} {100 * one.accuracy:+5.1f} points "
        f"({100 * one.low:+.1f} to {100 * one.high:+.1f}; {p}): {verdict}"
    )


def seeds(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Give each group's means and standard deviations over its seeds, a line a group.

    What its final models have is compared with the first group's (Welch 1947).
    """
    base = groups[0][0]
    rows = [["over seeds", "n", *MODELS, "chosen", "", ""]]
    for group in groups:
        tested = [run for run in group if run.test]
        values = {m: [_accuracy(run, m) for run in tested] for m in (*MODELS, "chosen")}
        params = [said for said in changed(group[0], base) if not said.startswith("seed ")]
        told = ""
        if group is not groups[0]:
            firsts = [_accuracy(run, "chosen") for run in groups[0] if run.test]
            told = _welch(values["chosen"], firsts)
        spread = [_spread(v) for v in values.values()]
        rows.append(["", str(len(tested)), *spread, told, ", ".join(params) or f"as {base.name}"])
    return aligned(rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def _welch(values: Sequence[float], others: Sequence[float]) -> str:
    if min(len(values), len(others)) < 2:
        return ""
    p = float(ttest_ind(values, others, equal_var=False).pvalue)
    return f"p = {p:.3f}: {'no more' if p >= NOISE else 'more'} than noise"


def _accuracy(run: Run, model: str) -> float:
    return float(run.test[run.chosen if model == "chosen" else model]["accuracy"])


def main() -> None:
    """Compare on the terminal."""
    parser = parser_of("compare", __doc__ or "")
    parser.add_argument("revisions", nargs="*", metavar="REV", help="the last commit and . if none")
    parser.add_argument("--experiments", action="store_true", help="and those on the last commit")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args()
    with one_line_errors():
        if options.experiments:
            options.revisions = [*(options.revisions or ["HEAD"]), *experiments()]
        runs = [read(revision) for revision in options.revisions or ("HEAD", HERE)]
        base, *others = runs
        found = corrected([one for run in others for one in against(run, base)])
        if options.json:
            comparisons = [asdict(one) for one in found]
            tested = {run.name: {"chosen": run.chosen, "test": run.test} for run in runs}
            print(json.dumps({"runs": tested, "against": comparisons}, indent=2))
            return
        for line in (*table(runs), *_differences(runs, found)):
            say(line)
        groups = by_seed(runs)
        if any(len(group) > 1 for group in groups) and len({r.name for r in runs}) > 2:
            say("")
            for line in seeds(groups):
                say(line)


def _differences(runs: Sequence[Run], found: Sequence[Against]) -> Iterator[str]:
    """Say how the runs differ from the first one: of many only what is more than noise."""
    base, *others = runs
    if len(runs) >= MANY:
        clear = [one for one in found if not one.noise]
        yield f"\nof {len(found)} comparisons with {base.name}, more than noise: {len(clear)}"
        width = max(len(run.name) for run in runs)
        yield from (f"{one.run:<{width}}  {said(one)}" for one in clear)
        return
    for run in others:
        params = ", ".join(changed(run, base)) or "same params"
        yield f"\n{run.name} against {base.name}: {params}"
        yield from (said(one) for one in found if one.run == run.name)


if __name__ == "__main__":
    main()
