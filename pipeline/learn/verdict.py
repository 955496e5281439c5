"""What a finished model is worth: test metrics, and how sure they are, by groups of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from pipeline.learn.metrics import balanced_accuracy

Scores = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
RESAMPLES = 5000
AT_ONCE = 1_000_000  # drawn numbers held in memory


def model_scores(scores: Scores, labels: Ints, weights: NDArray[np.float64]) -> dict[str, Any]:
    """Give the test metrics of one model; AUROC is null where a class is missing."""
    predicted, n_classes = scores.argmax(1), scores.shape[1]
    right = predicted == labels
    auroc = None
    if len(np.unique(labels)) == n_classes:
        p = softmax(scores, axis=1)
        auroc = float(
            roc_auc_score(labels, p[:, 1])
            if n_classes == 2
            else roc_auc_score(labels, p, multi_class="ovr", average="macro")
        )
    return {
        "accuracy": float(right.mean()),
        "accuracy_weighted": float((right * weights).sum() / weights.sum()),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "f1_macro": float(
            f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
        ),
        "auroc": auroc,
    }


def confusion(scores: Scores, labels: Ints) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): (C, C)."""
    counts: NDArray[np.int64] = confusion_matrix(
        labels, scores.argmax(1), labels=np.arange(scores.shape[1])
    )
    return counts


def simplest_of_the_best(right: Sequence[Bools], groups: Ints, tie: float) -> int:
    """Choose among models, from simple to costly, by which images (N,) each has right.

    The first one whose accuracy is no more than `tie` standard errors below the best. The costly
    ones took their best epoch on the same images, so a lead of less is no evidence (the rule of
    one standard error, Breiman et al. 1984). The standard error is that of the paired difference,
    over groups of images. Returns its position.
    """
    accuracies = [float(r.mean()) for r in right]
    best = right[int(np.argmax(accuracies))].astype(float)
    _, of = np.unique(groups, return_inverse=True)

    def ties(model: Bools) -> bool:
        behind = best - model
        deviations = np.bincount(of, weights=behind - behind.mean())
        return bool(behind.mean() <= tie * np.sqrt((deviations**2).sum()) / len(best))

    return next(place for place, model in enumerate(right) if ties(model))


def sure_above(probabilities: Scores, labels: Ints, wanted: float) -> float:
    """Find the lowest confidence from which on validation images are right often enough.

    Returns 0 if all of them together are, 1 if no such confidence exists.
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    order = np.argsort(-confidence, kind="stable")
    share = right[order].cumsum() / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(share >= wanted)
    if len(enough) == 0:
        return 1.0
    last = int(enough[-1])
    return 0.0 if last == len(order) - 1 else float(confidence[order[last]])


def accuracy_interval(right: Bools, groups: Ints, seed: int) -> tuple[float, float]:
    """Give the 95 % interval of an accuracy from which images (N,) were right.

    Where groups hold several images, by resampling whole groups (percentile bootstrap); where each
    image is on its own, Wilson's interval, which the bootstrap approaches with many images and
    which stays honest with few, or with all of them right.
    """
    if len(np.unique(groups)) == len(groups):
        found = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    return _by_groups(right.astype(float), groups, seed)


def difference(a: Bools, b: Bools, groups: Ints, seed: int) -> dict[str, float]:
    """Compare two models on the same images: accuracy of `a` minus `b`, 95 % interval, p-value.

    The interval is a bootstrap over groups, the p-value a two-sided permutation test that swaps
    the two models' answers for whole groups at a time.
    """
    change = a.astype(float) - b.astype(float)
    low, high = _by_groups(change, groups, seed)
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=change)
    random, swaps, extreme = np.random.default_rng(seed), 2 * RESAMPLES, 0
    each = max(1, AT_ONCE // len(sums))
    for start in range(0, swaps, each):
        signs = random.choice((-1.0, 1.0), (min(each, swaps - start), len(sums)))
        # A hair below the observed sum, so that equal sums count as such despite rounding.
        extreme += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    p_value = (1 + extreme) / (1 + swaps)
    return {"accuracy": float(change.mean()), "low": low, "high": high, "p_value": p_value}


def helped(found: dict[str, float]) -> str:
    """Say in a sentence whether fine-tuning helped, from the `difference` of stage 2 and probe."""
    better = (
        "helped" if found["low"] > 0 else "hurt" if found["high"] < 0 else "made no sure difference"
    )
    return (
        f"fine-tuning {better}: stage 2 minus probe {100 * found['accuracy']:+.1f} points "
        f"(95 % interval {100 * found['low']:+.1f} to {100 * found['high']:+.1f}, "
        f"p = {found['p_value']:.3f})"
    )


def _by_groups(values: NDArray[np.float64], groups: Ints, seed: int) -> tuple[float, float]:
    _, of = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(of, weights=values), np.bincount(of).astype(float)
    if len(sums) < 2 or np.ptp(sums / sizes) == 0:
        return float(values.mean()), float(values.mean())

    def mean(s: NDArray[Any], n: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        return np.asarray(s.sum(axis) / n.sum(axis))

    found = bootstrap(
        (sums, sizes),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
