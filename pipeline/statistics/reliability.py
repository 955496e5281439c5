"""Calibration: the accuracy by confidence, and the confidence threshold for "not sure"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from pipeline.statistics.significance import least_accuracy, usual_effect

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

FEWEST = 10  # images in a bin
HELD = 0.9  # share of the thresholds for "not sure" whose promise holds
STEP = 1.05  # ratio of successive numbers of images that are called sure
LIKELY = 0.8  # probability of a threshold with the number of images that is recommended
MOST_IMAGES = 1_000_000  # that are ever recommended


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

    The bins have equal numbers of images, not equal widths, so that every bin is informative
    (Nguyen and O'Connor 2015, arXiv 1508.05154). A bin has at least ten images, if there are ten.
    """
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, max(1, min(most, len(order) // FEWEST))) if len(order) else []
    return [Bin(float(confidence[p].mean()), float(right[p].mean()), len(p)) for p in parts]


def calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599), 0 to 1."""
    images = sum(one.images for one in bins)
    return sum(one.images / images * abs(one.accuracy - one.confidence) for one in bins)


@dataclass(frozen=True)
class Sure:
    """The confidence from which on a model is sure."""

    above: float | None  # None: no threshold can be promised
    # Validation images that a promise would need. None if there is one, or if no number suffices.
    images: int | None


def sure_threshold(probabilities: Floats, labels: Ints, groups: Ints, wanted: float) -> Sure:
    """Find the threshold of the likeliest class: see `sure_from`. Probabilities are (N, C)."""
    answers = probabilities.argmax(1)
    return sure_from(probabilities.max(1), answers == labels, groups, wanted)


def sure_from(confidence: Floats, right: NDArray[np.bool_], groups: Ints, wanted: float) -> Sure:
    """Find the lowest confidence above which the share `wanted` of images will be right.

    The promise holds in nine of ten cases: a threshold is accepted if the lower bound of the
    accuracy of the images above it is at least `wanted`. The search for the lowest threshold is
    valid, because the candidates are fixed before any label is used. They are tested downwards from
    the one that is expected to call most images sure, and the first failure ends the search (fixed
    sequence testing, as in Angelopoulos et al. 2021, arXiv 2110.01052).

    All are (N,): the answers' probabilities, which answers are right, and the images' groups.
    """
    if not (n := len(right)):
        return Sure(None, None)
    order = np.argsort(-confidence, kind="stable")
    confidence, right, groups = confidence[order].astype(np.float64), right[order], groups[order]
    steps = int(np.log(max(n, 2)) / np.log(STEP)) + 2
    # A threshold includes all images of its confidence.
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
    """Return how likely n images of this accuracy have a lower bound of at least `wanted`."""
    n = np.floor(n)
    wrong = binom.ppf(1 - HELD, n, 1 - wanted) - 1  # one more would be too many
    return np.where(wrong >= 0, binom.cdf(wrong, n, 1 - accuracy), 0.0)


def _images_needed(n: int, effective: Floats, means: Floats, wanted: float) -> int | None:
    """Return how many images like these n a promise would probably need, or None."""
    times = 1.0
    while n * times <= MOST_IMAGES:
        if (_chance(effective * times, means, wanted) >= LIKELY).any():
            return int(np.ceil(n * times))
        times *= STEP
    return None


def sure_in_words(above: float | None, wanted: float, images: int | None) -> str:
    """Return in words when the model says "not sure", or why it never does."""
    if above == 0:
        return f'the model never says "not sure": {wanted:.0%} of all answers are right'
    if above is not None:
        return (
            f'the model says "not sure" below a confidence of {above:.4f}: '
            f"above it, {wanted:.0%} of the answers are right"
        )
    needed = f"about {images:,} validation images" if images else "a more confident model"
    return (
        f'the model never says "not sure": no confidence threshold is certain to have {wanted:.0%} '
        f"of the answers above it right; this would take {needed}"
    )


def sure_by_answer(
    probabilities: Floats, answers: Ints, labels: Ints, groups: Ints, wanted: float
) -> list[Sure]:
    """Find a threshold for each of the answers (N,), from the images that got it."""
    found = []
    for answer in range(probabilities.shape[1]):
        given = answers == answer
        right = labels[given] == answer
        found.append(sure_from(probabilities[given, answer], right, groups[given], wanted))
    return found


def sure_by_answer_in_words(found: Sequence[Sure], classes: Sequence[str], wanted: float) -> str:
    """Return in words from which probability on each answer is sure."""
    told = []
    for name, one in zip(classes, found, strict=True):
        needed = f"; it would take about {one.images:,} answers of it" if one.images else ""
        said = f"never called unsure, as nothing can be promised{needed}"
        if one.above is not None:
            said = f"sure from {one.above:.4f} on" if one.above else "always sure"
        told.append(f"{name}: {said}")
    return f"answers of which {wanted:.0%} are right: {', '.join(told)}"
