"""Cut images into train, validation and test so that what belongs together stays together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DRAWS = 400  # more no longer brings the class counts of 44 groups closer


def draw(
    labels: NDArray[np.int64], groups: Sequence[str], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups that hold about `fraction` of each class.

    Of many seeded random orders of the groups, each cut where it comes closest to the fraction of
    all images, take the one whose class counts are closest to it. With groups of one image this
    is a stratified random split. Labels are (N,); returns the chosen (N,).

    Raises ValueError if there are fewer than two groups.
    """
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    n_groups, n_classes = int(group_of.max()) + 1, int(labels.max()) + 1
    if n_groups < 2:
        raise ValueError("one group only")
    counts = np.zeros((n_groups, n_classes), np.int64)  # images of each class in each group
    np.add.at(counts, (group_of, labels), 1)
    if (counts.sum(1) == 1).all():
        return _stratified(labels, fraction, seed)
    target = counts.sum(0) * fraction
    random = np.random.default_rng(seed)
    best, chosen = np.inf, np.zeros(n_groups, bool)
    for _ in range(DRAWS):
        order = random.permutation(n_groups)
        sizes = counts[order].sum(1).cumsum()
        cut = int(np.abs(sizes[:-1] - target.sum()).argmin()) + 1
        off = float((np.abs(counts[order[:cut]].sum(0) - target) / np.maximum(target, 1)).max())
        if off < best:
            best, chosen = off, np.isin(np.arange(n_groups), order[:cut])
    return chosen[group_of]


def _stratified(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose from each class its share, by largest remainder; at least one of two or more."""
    counts = np.bincount(labels)
    exact = counts * fraction
    take = np.floor(exact).astype(int)
    short = round(len(labels) * fraction) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:short]] += 1
    take = np.where(counts > 1, np.clip(take, 1, np.maximum(counts - 1, 1)), 0)
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label, n in enumerate(take):
        chosen[random.permutation(np.flatnonzero(labels == label))[:n]] = True
    return chosen


def together(*ties: Sequence[str]) -> list[int]:
    """Number the images so that two get the same number if any chain of ties links them.

    Each tie gives a name to every image; equal names tie, an empty name ties to nothing.
    """
    n = len(ties[0])
    images = np.arange(n)
    edges = [(images, images)]
    for tie in ties:
        first: dict[str, int] = {}
        edges.append(
            (images, np.array([first.setdefault(t, i) if t else i for i, t in enumerate(tie)]))
        )
    rows, columns = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(n, n))
    return [int(number) for number in connected_components(graph, directed=False)[1]]
