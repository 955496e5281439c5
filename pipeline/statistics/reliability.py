"""How far a model's confidence can be believed: the share that is right, by what it says."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from pipeline.statistics.significance import least_accuracy, usual_effect

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

FEWEST = 10  # images in a bin
HELD = 0.9  # of the thresholds for "not sure" that are promised, so many hold
STEP = 1.05  # from one number of images that are called sure to the next
LIKELY = 0.8  # chance of a promise with the number of images that is asked for
MOST_IMAGES = 1_000_000  # that anybody is asked for


@dataclass(frozen=True)
class Bin:
    """Images of about the same confidence."""

    confidence: float  # the mean
    accuracy: float
    images: int


def reliability(
    confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_], most: int = 10
) -> list[Bin]:
    """Put images (N,) into bins of equal numbers, from least to most confident.

    Equal numbers, not widths, so that every bin says something (Nguyen and O'Connor 2015, arXiv
    1508.05154); of fewer than ten images a bin says nothing, so of few there are fewer.
    """
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, max(1, min(most, len(order) // FEWEST))) if len(order) else []
    return [Bin(float(confidence[p].mean()), float(right[p].mean()), len(p)) for p in parts]


def calibration_error(bins: list[Bin]) -> float:
    """Give the expected calibration error (Guo et al. 2017, arXiv 1706.04599), 0 to 1."""
    images = sum(one.images for one in bins)
    return sum(one.images / images * abs(one.accuracy - one.confidence) for one in bins)


@dataclass(frozen=True)
class Sure:
    """From which confidence on a model is sure."""

    above: float | None  # None: no confidence can be promised
    images: int | None  # of validation that a promise would take; None: given, or no number would


def sure_threshold(probabilities: Floats, labels: Ints, groups: Ints, wanted: float) -> Sure:
    """Find the lowest confidence from which on the share `wanted` of images will be right.

    The promise holds in nine of ten cases: it is made where the lower bound of the accuracy of the
    images above a confidence is at least `wanted`. To search for the lowest such confidence is no
    cheating: the confidences to try are set before any label is looked at, from the one that is
    expected to call most images sure downwards, and the first that fails ends the search (fixed
    sequence testing, as in Angelopoulos et al. 2021, arXiv 2110.01052).

    Probabilities are (N, C), labels and groups (N,).
    """
    n = len(labels)
    order = np.argsort(-probabilities.max(1), kind="stable")
    confidence = probabilities.max(1)[order].astype(np.float64)
    right, groups = (probabilities.argmax(1) == labels)[order], groups[order]
    steps = int(np.log(max(n, 2)) / np.log(STEP)) + 2
    # A threshold takes all images of its confidence.
    tried = np.minimum(np.ceil(STEP ** np.arange(steps)).astype(int), n)
    tried = np.unique(np.searchsorted(-confidence, -confidence[tried - 1], side="right"))
    means = confidence.cumsum()[tried - 1] / tried
    effective = tried / [usual_effect(groups[:k]) for k in tried]
    chances = _chance(effective, means, wanted)
    above = None
    for k in tried[int((tried * chances).argmax()) :] if chances.any() else ():
        least = least_accuracy(right[:k], groups[:k], HELD)
        if least is None or least < wanted:
            break
        above = 0.0 if k == n else float(confidence[k - 1])
    return Sure(above, _images_needed(n, effective, means, wanted) if above is None else None)


def _chance(n: Floats, accuracy: Floats, wanted: float) -> Floats:
    """Return how likely n images of that accuracy have a lower bound of at least `wanted`."""
    n = np.floor(n)
    wrong = binom.ppf(1 - HELD, n, 1 - wanted) - 1  # one more would be too many
    return np.where(wrong >= 0, binom.cdf(wrong, n, 1 - accuracy), 0.0)


def _images_needed(n: int, effective: Floats, means: Floats, wanted: float) -> int | None:
    """Return how many images a promise would likely take if they are like these n, or None."""
    times = 1.0
    while n * times <= MOST_IMAGES:
        if (_chance(effective * times, means, wanted) >= LIKELY).any():
            return int(np.ceil(n * times))
        times *= STEP
    return None


def sure_in_words(above: float | None, wanted: float, images: int | None) -> str:
    """Say when the answer is "not sure", or why that is never said."""
    if above == 0:
        return f'"not sure" is never said: {wanted:.0%} of all answers are right'
    if above is not None:
        return (
            f'"not sure" is said below a confidence of {above:.4f}: above it {wanted:.0%} are right'
        )
    needed = f"about {images:,} validation images" if images else "a model that is surer"
    return (
        f'"not sure" is never said: no confidence is sure to have {wanted:.0%} right above it, '
        f"which would take {needed}"
    )
