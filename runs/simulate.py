"""Check by simulation what intervals, p-values and "not sure" promise.

    python -m runs.simulate intervals --draws 2000    # the tables of docs/intervals.md
    python -m runs.simulate measures --draws 1000
    python -m runs.simulate sure --draws 1000

Answers within a group are correlated: each group has its own accuracy, drawn from a beta
distribution with the given mean and correlation between two images of a group. Half of the groups
are equally easy or hard for two models, whose answers for an image agree more than by chance.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, t

from pipeline.commands.differences import NOISE
from pipeline.scoring.metrics import MEASURES, by_image
from pipeline.stage_runtime.schema import Measure
from pipeline.statistics.reliability import sure_threshold
from pipeline.statistics.significance import (
    accuracy_interval,
    difference,
    measure_difference,
    measure_interval,
)

ACCURACIES, CORRELATIONS = (0.6, 0.85, 0.97), (0.0, 0.1, 0.3)
GROUPS, SIZES = (5, 8, 12, 30), ("equal", "log-normal")
MEAN_SIZE = 30  # images a group
GAIN = 0.05  # of the better model, where there is one
AGREEING = 0.6  # share of the images on which both models are right or wrong together, if possible
WANTED = 0.95  # share that is right above the threshold of "not sure"
# Shapes of the distribution of confidence, with a mean of .9.
SHAPES = ("two ends", "beta, steep", "beta, flat")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """A simulated setting and its results."""

    accuracy: float
    correlation: float
    groups: int
    sizes: str
    covered: float  # share of the intervals of an accuracy that contain the true value
    width: float  # mean width, as a multiple of the mean width of the cluster t-interval
    difference_covered: float  # the same for the difference of two models, with and without a gain
    difference_width: float
    false: float  # share of pairs without a difference that are reported as different
    t_covered: float  # the same for the cluster t-interval of an accuracy
    t_false: float
    absolute: tuple[
        float, float, float, float
    ]  # mean widths: ours and t's, accuracy and difference


def sizes_of(random: np.random.Generator, groups: int, kind: str) -> Ints:
    """Draw the number of images of each group: (G,)."""
    if kind == "equal":
        return np.full(groups, MEAN_SIZE)
    drawn = random.lognormal(np.log(MEAN_SIZE) - 0.5, 1, groups)
    return np.maximum(1, np.round(drawn)).astype(int)


def shares(random: np.random.Generator, mean: float, correlation: float, rank: Floats) -> Floats:
    """Return the accuracy of each group, at these ranks of its distribution: (G,)."""
    if not correlation:
        return np.full(len(rank), mean)
    total = 1 / correlation - 1
    return np.asarray(beta.ppf(rank, mean * total, (1 - mean) * total))


def two_models(
    random: np.random.Generator, accuracy: float, gain: float, correlation: float, sizes: Ints
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Ints]:
    """Draw the images (N,) that two models have right, and the images' groups."""
    ranks = random.random((2, len(sizes)))
    ranks[1] = np.where(random.random(len(sizes)) < 0.5, ranks[0], ranks[1])
    p, q = (
        shares(random, mean, correlation, rank)
        for mean, rank in zip((accuracy, accuracy - gain), ranks, strict=True)
    )
    groups = np.repeat(np.arange(len(sizes)), sizes)
    ease = random.random(len(groups))
    other = np.where(random.random(len(groups)) < AGREEING, ease, random.random(len(groups)))
    return ease < p[groups], other < q[groups], groups


def cluster_t(values: Floats, groups: Ints) -> tuple[float, float]:
    """Return the usual 95 % interval of a mean over groups: Student's t with G - 1 degrees."""
    sizes = np.bincount(groups)
    n, g, mean = len(values), len(sizes), float(values.mean())
    residuals = np.bincount(groups, weights=values) - mean * sizes
    arm = t.ppf(0.975, g - 1) * np.sqrt((residuals**2).sum() * g / (g - 1)) / n
    return mean - arm, mean + arm


def cells(draws: int, seed: int = 0) -> Iterator[Cell]:
    """Simulate all cells."""
    whole = list(product(ACCURACIES, CORRELATIONS, GROUPS, SIZES))
    for i, (accuracy, correlation, groups, sizes) in enumerate(whole):
        random = np.random.default_rng([seed, i])
        noted: dict[str, list[float]] = {}

        def note(noted: dict[str, list[float]] = noted, **values: float) -> None:
            for name, value in values.items():
                noted.setdefault(name, []).append(value)

        for draw in range(draws):
            gain = GAIN * (draw % 2)
            drawn = sizes_of(random, groups, sizes)
            a, b, of = two_models(random, accuracy, gain, correlation, drawn)
            found = accuracy_interval(a, of)
            assert found is not None
            usual = cluster_t(a.astype(float), of)
            apart, usual_apart = difference(a, b, of), cluster_t(a.astype(float) - b, of)
            low, high = apart["low"], apart["high"]
            assert low is not None
            assert high is not None
            note(
                covered=found[0] <= accuracy <= found[1],
                width=found[1] - found[0],
                t_covered=usual[0] <= accuracy <= usual[1],
                t_width=usual[1] - usual[0],
                difference_covered=low <= gain <= high,
                difference_width=high - low,
                t_difference_width=usual_apart[1] - usual_apart[0],
            )
            if not gain:
                note(
                    false=not low <= 0 <= high,
                    t_false=not usual_apart[0] <= 0 <= usual_apart[1],
                )
        mean = {name: float(np.mean(values)) for name, values in noted.items()}
        yield Cell(
            *(accuracy, correlation, groups, sizes, mean["covered"]),
            mean["width"] / mean["t_width"],
            mean["difference_covered"],
            mean["difference_width"] / mean["t_difference_width"],
            *(mean["false"], mean["t_covered"], mean["t_false"]),
            (
                *(mean["width"], mean["t_width"]),
                *(mean["difference_width"], mean["t_difference_width"]),
            ),
        )


def ratios_of_means(found: list[Cell]) -> tuple[float, float]:
    """Return the mean widths over all cells as multiples of the cluster t-interval's."""
    ours, usual, apart, usual_apart = np.mean([cell.absolute for cell in found], axis=0)
    return float(ours / usual), float(apart / usual_apart)


def confidences(random: np.random.Generator, shape: str, n: int) -> Floats:
    """Draw confidences (N,) of a shape, with a mean of .9."""
    if shape == "two ends":
        return np.asarray(1 / (1 + np.exp(-np.abs(random.normal(0, 5.2, n)))))
    a, b = (2.0, 0.5) if shape == "beta, steep" else (4.0, 1.0)
    return np.asarray(0.5 + 0.5 * random.beta(a, b, n))


@dataclass(frozen=True)
class Promise:
    """The results of "not sure" on sets of one size and shape."""

    shape: str
    images: int
    held: float  # share of sets whose accuracy above the threshold is high enough
    used: float  # mean share that is called sure, of the images that could be
    none: float  # share of sets without a threshold


def promises(draws: int, seed: int = 0) -> Iterator[Promise]:
    """Simulate thresholds from calibrated scores of two classes."""
    for shape, images in product(SHAPES, (30, 100, 300)):
        random = np.random.default_rng([seed, SHAPES.index(shape), images])
        # The true probability of a right answer is the confidence.
        everything = np.sort(confidences(random, shape, 400_000))[::-1]
        running = everything.cumsum() / np.arange(1, len(everything) + 1)
        best = float((running >= WANTED).mean())
        held, used = [], []
        for _ in range(draws):
            p = confidences(random, shape, images)
            labels = (random.random(images) > p).astype(int)
            found = sure_threshold(np.stack([p, 1 - p], 1), labels, np.arange(images), WANTED)
            above = everything[everything >= (2.0 if found.above is None else found.above)]
            held.append(not len(above) or above.mean() >= WANTED)
            used.append(len(above) / len(everything) / best)
        none = float(np.mean([share == 0 for share in used]))
        yield Promise(shape, images, float(np.mean(held)), float(np.mean(used)), none)


MEASURED: tuple[Measure, ...] = ("balanced_accuracy", "f1_macro", "auroc")
IMAGES, RARE = ((30, 0), (100, 0), (300, 0), (600, 12), (600, 30)), (0.5, 0.2, 0.05)


@dataclass(frozen=True)
class Promised:
    """The results of a measure's intervals in one setting."""

    covered: float  # share of intervals that contain the measure of all images
    width: float  # mean
    false: float  # share of pairs of equally good models that are reported as different


def two_classes(
    random: np.random.Generator, n: int, rare: float, groups: int
) -> tuple[list[Floats], Ints, Ints]:
    """Draw scores (N, 2) of two equally good models, labels and groups; 0 groups: single images.

    Groups are harder or easier for both. The rare class has two images at least.
    """
    labels = (random.random(n) < rare).astype(int)
    labels[:4] = (0, 1, 0, 1)
    of = np.arange(n) if groups == 0 else random.integers(0, groups, n)
    hard = random.normal(0, 0.5, of.max() + 1)[of] if groups else np.zeros(n)
    sign, both = 2 * labels - 1, random.normal(0, 0.7, n)
    lines = (sign * (1.2 - hard) + both + random.normal(0, 0.7, n) for _ in range(2))
    return [np.stack([-line, line], 1) / 2 for line in lines], labels, of


def promised(measure: Measure, n: int, rare: float, groups: int, draws: int) -> Promised:
    """Simulate a measure's intervals and differences."""
    random = np.random.default_rng([n, groups, round(100 * rare)])
    (many, _), truth, _ = two_classes(random, 200_000, rare, 4000 if groups else 0)
    wanted = by_image(measure, many, truth)
    assert wanted is not None
    covered, widths, false = [], [], []
    for _ in range(draws):
        scores, labels, of = two_classes(random, n, rare, groups)
        a, b = (by_image(measure, of_model, labels) for of_model in scores)
        assert a is not None
        assert b is not None
        low, high = measure_interval(measure, a, labels, of) or (0.0, 1.0)
        covered.append(low <= wanted.mean() <= high)
        widths.append(high - low)
        p = measure_difference(measure, a, b, labels, of)["p_value"]
        false.append(p is not None and p < NOISE)
    return Promised(float(np.mean(covered)), float(np.mean(widths)), float(np.mean(false)))


def table(found: list[Cell], value: Any, form: str) -> list[str]:
    """Return one figure of all cells as a Markdown table."""
    columns = list(product(GROUPS, SIZES))
    lines = [
        "| accuracy | correlation | " + " | ".join(f"{g}, {s}" for g, s in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for accuracy, correlation in product(ACCURACIES, CORRELATIONS):
        row = [c for c in found if (c.accuracy, c.correlation) == (accuracy, correlation)]
        values = " | ".join(format(value(cell), form) for cell in row)
        lines.append(f"| {accuracy} | {correlation} | {values} |")
    return lines


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("intervals", "measures", "sure"))
    parser.add_argument("--draws", type=int, default=2000)
    options = parser.parse_args()
    if options.what == "measures":
        print("| measure | share of the rarer class | images | groups | covered | width | false |")
        print("|---|---|---|---|---|---|---|")
        for measure, rare, (n, groups) in product(MEASURED, RARE, IMAGES):
            m = promised(measure, n, rare, groups, options.draws)
            cells_of = f"{m.covered:.3f} | {m.width:.3f} | {m.false:.3f}"
            print(f"| {MEASURES[measure]} | {rare} | {n} | {groups or 'none'} | {cells_of} |")
        return
    if options.what == "sure":
        print(
            "| confidences | images | promise held | used | no threshold |\n|---|---|---|---|---|"
        )
        for p in promises(options.draws):
            print(f"| {p.shape} | {p.images} | {p.held:.3f} | {p.used:.2f} | {p.none:.2f} |")
        return
    found = list(cells(options.draws))
    for title, value, form in (
        ("Coverage, one accuracy", lambda cell: cell.covered, ".3f"),
        ("Coverage, a difference", lambda cell: cell.difference_covered, ".3f"),
        ("Said to differ without a difference", lambda cell: cell.false, ".3f"),
        ("Width, one accuracy", lambda cell: cell.width, ".2f"),
        ("Width, a difference", lambda cell: cell.difference_width, ".2f"),
        ("Coverage of the cluster t-interval, one accuracy", lambda cell: cell.t_covered, ".3f"),
        ("Said to differ by it", lambda cell: cell.t_false, ".3f"),
    ):
        print("", title, "", *table(found, value, form), sep="\n")
    one, apart = ratios_of_means(found)
    print(f"\nwidths over all cells, of the cluster t-interval's: {one:.2f}, {apart:.2f}")


if __name__ == "__main__":
    main()
