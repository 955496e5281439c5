"""The labelled images of one split, from the rows of index.csv."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """The labelled rows of one split, in the order of its images; each array is (N,)."""

    ids: NDArray[np.int64]  # rows of all packed images
    paths: list[str]
    labels: NDArray[np.int64]  # positions in Facts.classes
    groups: NDArray[np.int64]
    weights: NDArray[np.float64]
