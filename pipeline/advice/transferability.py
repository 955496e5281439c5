"""The size of a data set, and its similarity to the data that the weights were trained on."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from pipeline.advice.prior_results import LARGE
from pipeline.probing.codes import LAST, SOURCE

AT_ONCE = 256  # images whose probabilities are in memory
SIMILAR = 0.2  # source_information from which the data count as similar to the source's

Codes = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Transferability:
    """The measures that determine the case."""

    images: int  # of training
    classes: int
    smallest_class: int  # its training images
    early: float  # accuracy by cross-validation of the best probe on a block's codes
    late: float  # of the best on the last codes
    # Of the source's classifier; None for weights that are published without one.
    source_confidence: float | None  # its mean confidence on these images
    source_information: float | None  # share of the labels' entropy that its classes explain


def source_confidence(logits: Codes) -> float:
    """Return the mean confidence (highest probability) of the source's classifier.

    `logits` are (N, S), of S source classes.
    """
    return sum(float(p.max(1).sum()) for p in _probabilities(logits)) / len(logits)


def source_information(logits: Codes, labels: Ints) -> float:
    """Return the share of the labels' entropy that the source's classes explain: 0 none, 1 all.

    This is one plus LEEP divided by that entropy (Nguyen et al. 2020, arXiv 2002.12462). LEEP
    predicts an image's label from its source probabilities, by the joint distribution of labels and
    source classes.

    `logits` are (N, S), `labels` (N,).
    """
    shares = np.bincount(labels) / len(labels)
    joint = np.zeros((len(shares), logits.shape[1]))  # (C, S)
    for y, p in zip(_parts(labels), _probabilities(logits), strict=True):
        np.add.at(joint, y, p)
    of_source = joint / np.maximum(joint.sum(0), np.finfo(float).tiny)  # a class may not occur
    of_labels = (
        np.log(np.einsum("ns,ns->n", p, of_source[y])).sum()
        for y, p in zip(_parts(labels), _probabilities(logits), strict=True)
    )
    leep = sum(of_labels) / len(labels)
    shares = shares[shares > 0]
    entropy = -(shares * np.log(shares)).sum()
    return float(1 + leep / entropy) if entropy else 0.0


def _parts(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Split rows into parts, to limit the memory of what is computed from them."""
    return (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))


def _probabilities(logits: Codes) -> Iterator[NDArray[np.float64]]:
    """Return the softmax of logits (N, S), some rows at a time."""
    return (softmax(np.asarray(part, np.float64), axis=1) for part in _parts(logits))


def profile(grid: Path, depths: Sequence[str]) -> dict[str, float]:
    """Read each depth's accuracy by cross-validation, from its grid cell with the lowest loss.

    LDA counts only where a depth has no other cell: it gains more on the wide codes of blocks than
    on the last ones, and the limits of the cases were set without it.
    """
    best: dict[str, tuple[bool, float, float]] = {}
    with grid.open(newline="", encoding="utf-8") as lines:
        for cell in csv.DictReader(lines):
            found = cell["kind"] == "lda", float(cell["loss"]), float(cell["accuracy"])
            best[cell["depth"]] = min(best.get(cell["depth"], found), found)
    return {depth: best[depth][-1] for depth in depths if depth in best}


def transferability(
    labels: Ints, rows: Ints, logits: Codes | None, by_depth: dict[str, float]
) -> Transferability:
    """Return the measures that determine the case.

    They are computed from all labels (N,), the source's logits (R, S) of the images at `rows` (R,),
    if it has a classifier, and the profile.
    """
    counts = np.bincount(labels)
    of_blocks = [a for depth, a in by_depth.items() if depth not in (LAST, SOURCE)]
    return Transferability(
        images=len(labels),
        classes=len(counts),
        smallest_class=int(counts[counts > 0].min()),
        early=max(of_blocks, default=0.0),
        late=by_depth[LAST],
        source_confidence=None if logits is None else source_confidence(logits),
        source_information=None if logits is None else source_information(logits, labels[rows]),
    )


def case_of(found: Transferability) -> int | None:
    """Return the number of the case: 1 small, 2 large and similar; 3 small, 4 large and different.

    Data are similar if the source's classes explain much of the labels' entropy. Of all measures,
    this one ranked the gains of our own runs best (runs/known.py). Those runs lie on both sides of
    the bound, at .04 to .09 and from .26 on. None if the source has no classifier.
    """
    if found.source_information is None:
        return None
    different = found.source_information < SIMILAR
    return int(1 + (found.images >= LARGE) + 2 * different)
