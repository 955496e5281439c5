"""Intervals and p-values of an accuracy or another measure, and of a difference of two.

Predictions for images of one group (a patient, a module, near duplicates) are correlated, so the
precision depends on the number of groups, not of images. All results here use one statistic, the
mean over images with this variance:

    variance for independent images × design effect       (Kish 1965, Survey Sampling)
    design effect = 1 + (mean size of an image's group - 1) × correlation within groups

The correlation is estimated from the groups' residuals (the CR2 form of Bell and McCaffrey 2002,
which is unbiased if images are independent). Few groups say little about it, and groups without an
error say nothing, so the estimate is shrunk towards a usual value with the weight of a few groups.
The degrees of freedom are those of the estimated part of the variance (Satterthwaite 1946). Both
constants were chosen by the simulation in docs/intervals.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, norm, t

from pipeline.stage_runtime.schema import Measure

Values = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Interval = tuple[float, float]
Tested = tuple[float, float, float]  # low, high and the p-value

LEAST_GROUPS = 3  # with fewer groups there is no interval
USUAL_CORRELATION, USUAL_GROUPS = (
    0.1,
    2.5,
)  # the correlation that is assumed, and its weight in groups
CONFIDENCE = 0.95
TINY = 1e-12  # a spread that is due to rounding
PSEUDO = 2  # added images on which models differ, one in each direction (Bonett and Price 2012)


@dataclass(frozen=True)
class Design:
    """The effect of groups on the variance of a mean over images."""

    effect: float  # the factor on the variance
    freedom: float  # degrees of freedom of its estimate

    def quantile(self, confidence: float) -> float:
        """Return the two-sided quantile of Student's t."""
        return float(t.ppf(0.5 + confidence / 2, self.freedom))


def accuracy_interval(right: Bools, groups: Ints) -> Interval | None:
    """Return the 95 % interval of an accuracy from which images (N,) were right, or None.

    This is Wilson's score interval (1927) with the number of images divided by the design effect,
    which is 1 if each image is its own group. It is None for fewer than three groups.
    """
    if (found := _design(right.astype(float), _rarer(right), groups)) is None:
        return None
    return _wilson(float(right.mean()), len(right) / found.effect, found)


def _wilson(share: float, n: float, design: Design) -> Interval:
    """Return Wilson's score interval of a share of so many images."""
    z2 = design.quantile(CONFIDENCE) ** 2
    middle, arm = share + z2 / (2 * n), np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2)))
    low, high = (middle - arm) / (1 + z2 / n), (middle + arm) / (1 + z2 / n)
    return max(0.0, min(share, float(low))), min(1.0, max(share, float(high)))


def measure_interval(
    measure: Measure, values: Values, labels: Ints, groups: Ints
) -> Interval | None:
    """Return the 95 % interval of a measure from its `by_image` values (N,), or None.

    Balanced accuracy, macro F1 and AUROC have Wilson's interval for the number of images that
    explains their variance, but at most the number that would if all classes were recognised
    equally well: a rare class without an error is not known well. Log loss has a t-interval. It is
    None for fewer than three groups.
    """
    if measure == "accuracy":
        return accuracy_interval(values > 0, groups)
    mean = float(values.mean())
    if (found := _design(values, (values - mean) ** 2, groups)) is None:
        return None
    variance = float(values.var()) * found.effect / len(values)
    if measure == "log_loss":
        arm = found.quantile(CONFIDENCE) * float(np.sqrt(variance))
        return max(0.0, -mean - arm), -mean + arm
    most = _images_of_equal_classes(labels) / found.effect
    n = min(most, mean * (1 - mean) / variance) if variance > TINY else most
    return _wilson(mean, n, found)


def _images_of_equal_classes(labels: Ints) -> float:
    """Return how many images of equally frequent classes say as much about the mean recall."""
    images = np.bincount(labels)
    images = images[images > 0]
    return float(len(images) ** 2 / (1 / images).sum())


def measure_difference(
    measure: Measure, a: Values, b: Values, labels: Ints, groups: Ints
) -> dict[str, float | None]:
    """Compare two models by a measure from their `by_image` values (N,), as `difference` does.

    The value is that of `a` minus that of `b`, of log loss too, where less is better.
    """
    if measure == "accuracy":
        found = difference(a > 0, b > 0, groups)
        return {"value": found.pop("accuracy"), **found}
    change = b - a if measure == "log_loss" else a - b
    mean, n = float(change.mean()), len(change)
    if (design := _design(change, (change - mean) ** 2, groups)) is None:
        return {"value": mean, "low": None, "high": None, "p_value": None}
    variance = float(change.var()) / n
    if measure != "log_loss":
        variance += PSEUDO / _images_of_equal_classes(labels) ** 2
    low, high, p_value = _t_test(mean, variance, design)
    return {"value": mean, "low": low, "high": high, "p_value": p_value}


def _t_test(mean: float, variance: float, design: Design) -> Tested:
    """Test a mean against 0, from its variance if images were independent."""
    error = float(np.sqrt(variance * design.effect))
    if error == 0:
        return mean, mean, float(mean == 0)
    arm = design.quantile(CONFIDENCE) * error
    return mean - arm, mean + arm, float(2 * t.sf(abs(mean) / error, design.freedom))


def difference(a: Bools, b: Bools, groups: Ints) -> dict[str, float | None]:
    """Compare two models on the same images: accuracy of `a` minus `b`, 95 % interval, p-value.

    The p-value is two-sided. It is below .05 exactly if the interval excludes 0, as both use the
    statistic that this module describes. Low, high and p-value are None for fewer than three
    groups.
    """
    change = a.astype(float) - b.astype(float)
    mean, n, differing = float(change.mean()), len(change), change != 0
    if (found := _design(change, _rarer(differing), groups)) is None:
        return {"accuracy": mean, "low": None, "high": None, "p_value": None}
    variance = (differing.sum() + PSEUDO) / (n + PSEUDO) - (mean * n / (n + PSEUDO)) ** 2
    low, high, p_value = _t_test(mean, variance / n, found)
    return {
        "accuracy": mean,
        "low": max(-1.0, low),
        "high": min(1.0, high),
        "p_value": p_value,
    }


def over_resplits(
    a: Sequence[float], b: Sequence[float], ratio: float, paired: bool
) -> Tested | None:
    """Return interval and p-value of the mean of `a` minus that of `b` over re-splits of one set.

    Re-splits share most of their images, so more re-splits don't narrow the interval as new images
    would. The variance of a mean is (1 / number + `ratio`) times that of a value, where `ratio` is
    the number of test images divided by that of training images (Nadeau and Bengio 2003, Machine
    Learning 52). With `paired`, values at the same position are of the same split.

    None if there is no spread to measure: fewer than two values, or all the same.
    """
    samples = [np.subtract(a, b)] if paired else [np.array(a), -np.array(b)]
    if min(len(values) for values in samples) < 2:
        return None
    mean = float(sum(values.mean() for values in samples))
    parts = [float(v.var(ddof=1)) * (1 / len(v) + ratio) for v in samples]
    error = float(np.sqrt(sum(parts)))
    if error < TINY:
        return None
    freedom = sum(parts) ** 2 / sum(
        p**2 / (len(v) - 1) for p, v in zip(parts, samples, strict=True)
    )
    arm = float(t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    return mean - arm, mean + arm, float(2 * t.sf(abs(mean) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests (Holm 1979, Scandinavian Journal of Statistics 6)."""
    raised, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        raised[i] = highest
    return raised


def least_accuracy(right: Bools, groups: Ints, confidence: float) -> float | None:
    """Return a lower confidence bound of an accuracy, or None for fewer than three groups.

    This is the one-sided bound of Clopper and Pearson (1934) for the effective number of images
    (Korn and Graubard 1998). It is exact if each image is its own group.
    """
    if (found := _design(right.astype(float), _rarer(right), groups)) is None:
        return None
    normal = float(norm.ppf(confidence))
    n = len(right) / found.effect * (normal / float(t.ppf(confidence, found.freedom))) ** 2
    k = n * float(right.mean())
    return float(beta.ppf(1 - confidence, k, n - k + 1)) if k > 0 else 0.0


def usual_effect(groups: Ints) -> float:
    """Return the design effect of groups (N,) if only their sizes are known."""
    return 1 + (_size_seen(np.unique(groups, return_counts=True)[1]) - 1) * USUAL_CORRELATION


def _size_seen(sizes: NDArray[Any]) -> float:
    """Return the size of an image's group, as a mean over images."""
    return float((sizes.astype(float) ** 2).sum() / sizes.sum())


def _rarer(events: Bools) -> Bools:
    """Return the images (N,) that make an answer vary: those with it, or without, if fewer."""
    return events if 2 * events.sum() <= len(events) else ~events


def _design(values: Values, varies: Values | Bools, groups: Ints) -> Design | None:
    """Estimate the effect of groups on the mean of values (N,); None for too few groups.

    `varies` (N,) says how much each image makes the values vary: of answers that are right or
    wrong, 1 for the rarer ones; of other values, the squared distance to the mean.
    """
    _, of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(of)
    if len(sizes) < LEAST_GROUPS:
        return None
    n, size = len(values), _size_seen(sizes)
    if size == 1:
        return Design(1.0, np.inf)
    mean, variance = float(values.mean()), float(values.var())
    shares = sizes / n
    residuals = np.bincount(of, weights=values) - mean * sizes
    measured = 1.0
    if variance > 0:
        measured = float((residuals**2 / (1 - shares)).sum()) / (n * variance)
    # Only the groups with images that vary contribute to the estimate of the correlation.
    counts = np.bincount(of, weights=varies)
    from_groups = float(counts.sum() ** 2 / (counts**2).sum()) if counts.any() else 0.0
    known = max(0.0, min(_freedom(shares), from_groups - 1))
    usual = (size - 1) * USUAL_CORRELATION
    excess = (known * (measured - 1) + USUAL_GROUPS * usual) / (known + USUAL_GROUPS)
    unknown = (size - 1) / size  # the largest share of the variance that can be due to groups
    return Design(1 + max(0.0, excess), (known + USUAL_GROUPS) / unknown**2)


def _freedom(shares: NDArray[np.float64]) -> float:
    """Return Bell and McCaffrey's degrees of freedom for groups with these shares of the images.

    They are those of the sum of squared residuals, each divided by 1 - share, for independent
    images. G groups of equal size have G - 1.
    """
    squares = shares**2 / (1 - shares)
    return float(1 / ((shares**2).sum() + squares.sum() ** 2 - (squares**2).sum()))
