"""How far a model's confidence can be believed: the share that is right, by what it says."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 10  # images in a bin


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
