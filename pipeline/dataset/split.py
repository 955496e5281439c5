"""Split images into train, validation and test, without dividing groups."""

import warnings
from collections.abc import Iterable
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DRAWS = 400  # more draws don't improve the class counts of 44 groups


def draw(
    labels: NDArray[np.int64], groups: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups that hold about `fraction` of each class.

    Of many seeded random orders of the groups, each cut where it comes closest to the fraction of
    all images, the one whose class counts are closest to it is used. If all groups are single
    images, this is a stratified random split. Labels and groups are (N,); returns a mask (N,).

    Raises ValueError if there are fewer than two groups.
    """
    numbers, group_of = np.unique(groups, return_inverse=True)
    # Sorted as strings, as in earlier versions, so that the same groups are drawn.
    group_of = np.argsort(np.argsort(numbers.astype(np.bytes_)))[group_of]
    sizes = np.bincount(group_of)
    n_groups = len(sizes)
    if n_groups < 2:
        raise ValueError("one group only")
    if (sizes == 1).all():
        return _stratified(labels, fraction, seed)
    target = np.bincount(labels) * fraction
    random = np.random.default_rng(seed)
    best, chosen = np.inf, np.zeros(n_groups, bool)
    for _ in range(DRAWS):
        order = random.permutation(n_groups)
        ends = sizes[order].cumsum()
        cut = int(np.abs(ends[:-1] - target.sum()).argmin()) + 1
        drawn = np.zeros(n_groups, bool)
        drawn[order[:cut]] = True
        # Counted over images: an array of groups x classes could be large.
        counts = np.bincount(labels[drawn[group_of]], minlength=len(target))
        off = float((np.abs(counts - target) / np.maximum(target, 1)).max())
        if off < best:
            best, chosen = off, drawn
    return chosen[group_of]


def fold(
    labels: NDArray[np.int64], groups: NDArray[np.int64], number: int, folds: int, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups: one of `folds` parts, numbered from 1, that together hold all images.

    Each part holds about the same number of images of each class. Labels and groups are (N,);
    returns a mask (N,).

    Raises ValueError if there are fewer groups than folds, or if no class has an image for each
    fold.
    """
    # Takes a second to import, and is seldom needed.
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    n_groups = len(np.unique(groups))
    if n_groups < folds:
        raise ValueError(f"{folds} folds of {n_groups} groups")
    each = StratifiedKFold if n_groups == len(groups) else StratifiedGroupKFold
    cut = each(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
        _, chosen = next(islice(cut.split(labels, labels, groups), number - 1, None))
    mask = np.zeros(len(labels), bool)
    mask[chosen] = True
    return mask


def _stratified(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Choose each class's share by largest remainder; at least one of two or more images."""
    counts = np.bincount(labels)
    exact = counts * fraction
    take = np.floor(exact).astype(int)
    short = round(len(labels) * fraction) - int(take.sum())
    take[np.argsort(take - exact, kind="stable")[:short]] += 1
    take = np.where(counts > 1, np.clip(take, 1, np.maximum(counts - 1, 1)), 0)
    random = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    of_class = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    for images, n in zip(of_class, take, strict=True):
        chosen[random.permutation(images)[:n]] = True
    return chosen


def linked_groups(*ties: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the images so that two get the same number if any chain of ties links them.

    Each tie gives every image a number, (N,): equal ones tie, negative ones tie to nothing.
    """
    n = len(ties[0])
    images = np.arange(n)
    edges = [(images, images)]
    for tie in ties:
        _, first, of = np.unique(tie, return_index=True, return_inverse=True)
        edges.append((images, np.where(tie >= 0, first[of], images)))
    ones, others = (np.concatenate(side) for side in zip(*edges, strict=True))
    return components(ones, others, n)


def components(ones: NDArray[np.int64], others: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Number the connected component of each of n images, (n,), from linked pairs, (P,) each."""
    graph = coo_array((np.ones(len(ones), bool), (ones, others)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def numbered(names: Iterable[str]) -> NDArray[np.int64]:
    """Return a number for each name, (N,): equal for equal names, -1 for an empty one."""
    numbers: dict[str, int] = {"": -1}
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64)
