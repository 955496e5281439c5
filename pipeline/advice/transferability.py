"""How large a data set is, and how like the one that the weights were made for."""

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

AT_ONCE = 256  # images whose answers are in memory
SIMILAR = 0.2  # source_information from which data count as like the source's

Codes = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Transferability:
    """What the case is told by."""

    images: int  # of training
    classes: int
    smallest_class: int  # its training images
    early: float  # accuracy by cross-validation of the best probe on a block's codes
    late: float  # of the best on the last codes
    source_confidence: float  # how sure the source's classifier is of these images
    source_information: float  # what its classes tell of the labels, as a share


def source_confidence(logits: Codes) -> float:
    """Give how sure the source's classifier is of what it sees: the mean of its highest p.

    `logits` are (N, S), of S source classes.
    """
    return sum(float(p.max(1).sum()) for p in _probabilities(logits)) / len(logits)


def source_information(logits: Codes, labels: Ints) -> float:
    """Give the share of the labels' entropy that the source's classes explain: 0 none, 1 all.

    One plus LEEP over that entropy (Nguyen et al. 2020, arXiv 2002.12462): each image's label is
    told from the source classes it is taken for, by how labels and source classes go together.

    `logits` are (N, S), `labels` (N,).
    """
    shares = np.bincount(labels) / len(labels)
    joint = np.zeros((len(shares), logits.shape[1]))  # (C, S)
    for y, p in zip(_parts(labels), _probabilities(logits), strict=True):
        np.add.at(joint, y, p)
    of_source = joint / np.maximum(joint.sum(0), np.finfo(float).tiny)  # a class may go unseen
    of_labels = (
        np.log(np.einsum("ns,ns->n", p, of_source[y])).sum()
        for y, p in zip(_parts(labels), _probabilities(logits), strict=True)
    )
    leep = sum(of_labels) / len(labels)
    shares = shares[shares > 0]
    entropy = -(shares * np.log(shares)).sum()
    return float(1 + leep / entropy) if entropy else 0.0


def _parts(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Cut rows into parts that keep what is computed of them small."""
    return (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))


def _probabilities(logits: Codes) -> Iterator[NDArray[np.float64]]:
    """Give the softmax of logits (N, S), some rows at a time."""
    return (softmax(np.asarray(part, np.float64), axis=1) for part in _parts(logits))


def profile(grid: Path, depths: Sequence[str]) -> dict[str, float]:
    """Read each depth's accuracy by cross-validation, of its cell of the lowest loss."""
    best: dict[str, tuple[float, float]] = {}
    with grid.open(newline="", encoding="utf-8") as lines:
        for cell in csv.DictReader(lines):
            found = float(cell["loss"]), float(cell["accuracy"])
            best[cell["depth"]] = min(best.get(cell["depth"], found), found)
    return {depth: best[depth][1] for depth in depths if depth in best}


def transferability(
    labels: Ints, rows: Ints, logits: Codes, by_depth: dict[str, float]
) -> Transferability:
    """Gather what the case is told by.

    From all labels (N,), the source's logits (R, S) of the images at `rows` (R,), and the profile.
    """
    counts = np.bincount(labels)
    of_blocks = [a for depth, a in by_depth.items() if depth not in (LAST, SOURCE)]
    return Transferability(
        images=len(labels),
        classes=len(counts),
        smallest_class=int(counts[counts > 0].min()),
        early=max(of_blocks, default=0.0),
        late=by_depth[LAST],
        source_confidence=source_confidence(logits),
        source_information=source_information(logits, labels[rows]),
    )


def case_of(found: Transferability) -> int:
    """Number the case: 1 small, 2 large and similar; 3 small, 4 large and different.

    Similar is where the source's classes tell much of what the labels say. Of the evidence here
    this ranked the gains of our own runs best (runs/known.py); they lie on both sides of the bound,
    at .04 to .09 and from .26 on.
    """
    different = found.source_information < SIMILAR
    return int(1 + (found.images >= LARGE) + 2 * different)
