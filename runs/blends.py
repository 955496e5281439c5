"""Compare rules that make the final model of probe, stage 1 and stage 2, from few images or many.

    python -m runs.blends data/trials --images 30 100 0

Reads the scores that `runs.variants` kept. Each rule is given some validation images of a run (0:
all of them), drawn ten times, and judged by accuracy and log loss on the run's test split. Of each
set, that is the mean over its runs; the table shows the mean over the sets, and the differences
from always taking stage 2 with their standard error over sets.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from pipeline.commands.table import aligned
from pipeline.final_model.candidates import SINGLE
from pipeline.final_model.mixture import Mixture, fit_mixture
from pipeline.scoring.metrics import cross_entropy

DRAWS = 10
GREEDY = 20  # models that Caruana's selection adds up
Floats = NDArray[np.float64]
Scores = list[Floats]  # (N, C) of each model
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """A rule's accuracy and log loss."""

    accuracy: float
    loss: float


def calibrated(val: Scores, labels: Ints, weights: Sequence[float] | Floats) -> Mixture:
    """Average the models, each calibrated alone, with these weights."""
    fits = [fit_mixture([s], labels).temperatures[0] for s in val]
    return Mixture([float(weight) for weight in weights], fits, 1.0)


def alone(model: str, val: Scores, labels: Ints) -> Mixture:
    """Take one model, calibrated."""
    return calibrated(val, labels, [float(name == model) for name in SINGLE])


def simplest(val: Scores, labels: Ints) -> Mixture:
    """Take the first model within one standard error of the best accuracy."""
    right = [(s.argmax(1) == labels).astype(float) for s in val]
    best = right[int(np.argmax([r.mean() for r in right]))]

    def ties(model: NDArray[np.float64]) -> bool:
        return bool((best - model).mean() <= (best - model).std() / len(labels) ** 0.5)

    found = next(name for name, r in zip(SINGLE, right, strict=True) if ties(r))
    return alone(found, val, labels)


def most_accurate(val: Scores, labels: Ints) -> Mixture:
    """Take the model with the highest accuracy; the first of several."""
    accuracies = [float((s.argmax(1) == labels).mean()) for s in val]
    return alone(SINGLE[int(np.argmax(accuracies))], val, labels)


def lowest_loss(val: Scores, labels: Ints) -> Mixture:
    """Take the model with the lowest log loss once it is calibrated."""
    fits = calibrated(val, labels, [1.0] * len(val)).temperatures
    losses = [cross_entropy(s, labels, t) for s, t in zip(val, fits, strict=True)]
    return alone(SINGLE[int(np.argmin(losses))], val, labels)


def uniform(val: Scores, labels: Ints) -> Mixture:
    """Average all, calibrated, with equal weights."""
    return calibrated(val, labels, [1 / len(val)] * len(val))


def greedy(val: Scores, labels: Ints) -> Mixture:
    """Add the model that lowers the log loss most, again and again (Caruana et al. 2004)."""
    rows = np.arange(len(labels))
    each = zip(val, calibrated(val, labels, [1.0] * len(val)).temperatures, strict=True)
    p = np.stack([np.exp(log_softmax(s / t, axis=1)[rows, labels]) for s, t in each])
    counts = np.zeros(len(val))
    for taken in range(GREEDY):
        mixed = (counts @ p + p) / (taken + 1)
        counts[int(np.log(np.maximum(mixed, 1e-12)).mean(1).argmax())] += 1
    return calibrated(val, labels, counts / GREEDY)


RULES: dict[str, Callable[[Scores, Ints], Mixture]] = {
    **{f"always {model}": partial(alone, model) for model in SINGLE},
    "simplest within a standard error": simplest,
    "highest accuracy": most_accurate,
    "lowest log loss": lowest_loss,
    "uniform mean": uniform,
    "greedy selection": greedy,
    "mixture": fit_mixture,
}
BASE = "always stage2"


def main() -> None:
    """Print a table for each number of validation images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("kept", type=Path, help="the folder in which runs.variants keeps its runs")
    parser.add_argument("--variant", default="plain", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=[30, 100, 0])
    options = parser.parse_args()
    files = sorted(options.kept.glob(f"*/run-*-{options.variant}/scores.npz"))
    runs = [(file.parent.parent.name, dict(np.load(file))) for file in files]
    if not runs:
        raise SystemExit(
            f"{options.kept}: no runs of {options.variant}; see python -m runs.variants"
        )
    for n in options.images:
        print(f"{len(runs)} runs, {n or 'all'} validation images")
        for line in aligned(table(runs, n)):
            print(f"  {line}")


def table(runs: Sequence[tuple[str, dict[str, NDArray[np.float64]]]], n: int) -> list[list[str]]:
    """Return a row for each rule."""
    found: dict[str, dict[str, list[Judged]]] = {rule: {} for rule in RULES}
    for name, scores in runs:
        for rule, of_sets in found.items():
            of_sets.setdefault(name, []).append(judged(RULES[rule], scores, n))
    means = {
        rule: {name: _mean(of) for name, of in of_sets.items()} for rule, of_sets in found.items()
    }
    rows = [["", "accuracy", "log loss", f"minus {BASE}, points", "log loss"]]
    for rule, of in means.items():
        gaps = [100 * (of[name].accuracy - means[BASE][name].accuracy) for name in of]
        losses = [of[name].loss - means[BASE][name].loss for name in of]
        total = _mean(list(of.values()))
        cells = [f"{total.accuracy:.4f}", f"{total.loss:.4f}"]
        rows.append([rule, *cells, _spread(gaps, 2), _spread(losses, 4)])
    return rows


def judged(
    rule: Callable[[Scores, Ints], Mixture], scores: dict[str, NDArray[np.float64]], n: int
) -> Judged:
    """Judge a rule on a run's test split, as the mean over draws of `n` validation images."""
    val, test = ([scores[f"{model}-{split}"] for model in SINGLE] for split in ("val", "test"))
    labels, truth = scores["labels-val"].astype(int), scores["labels-test"].astype(int)
    draws = [np.arange(len(labels))]
    if 0 < n < len(labels):
        draws = [np.random.default_rng(i).permutation(len(labels))[:n] for i in range(DRAWS)]
    found = []
    for some in draws:
        log_p = rule([s[some] for s in val], labels[some]).log_probabilities(test)
        right = float((log_p.argmax(1) == truth).mean())
        found.append(Judged(right, cross_entropy(log_p, truth)))
    return _mean(found)


def _mean(found: Sequence[Judged]) -> Judged:
    return Judged(mean(one.accuracy for one in found), mean(one.loss for one in found))


def _spread(values: Sequence[float], digits: int) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):+.{digits}f}{error}"


if __name__ == "__main__":
    main()
