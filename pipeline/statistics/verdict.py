"""Test metrics of a model, the choice of the final model, and the verdict in words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from pipeline.scoring.metrics import balanced_accuracy

Scores = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
TOO_FEW = "too few groups for an interval"


def model_scores(scores: Scores, labels: Ints, weights: NDArray[np.float64]) -> dict[str, Any]:
    """Return the test metrics of one model; AUROC is null if a class is missing."""
    predicted, n_classes = scores.argmax(1), scores.shape[1]
    right = predicted == labels
    auroc = None
    if len(np.unique(labels)) == n_classes:
        p = softmax(scores, axis=1)
        auroc = float(
            roc_auc_score(labels, p[:, 1])
            if n_classes == 2
            # One class at a time, as a matrix of all images and classes could be large.
            else np.mean([roc_auc_score(labels == c, p[:, c]) for c in range(n_classes)])
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


def first_unless_clearly_worse(right: Sequence[Bools], groups: Ints, tie: float) -> int:
    """Choose among models, the one to trust most first, by which images (N,) each has right.

    Returns the position of the first model, unless the accuracy of others is more than `tie`
    standard errors higher: then of the best of them. A few hundred validation images can't tell
    good models apart, so a smaller lead is mostly luck. The standard error is that of the paired
    difference, over groups of images.
    """
    first = right[0].astype(float)
    _, of = np.unique(groups, return_inverse=True)

    def is_clearly_better(model: Bools) -> bool:
        lead = model - first
        deviations = np.bincount(of, weights=lead - lead.mean())
        return bool(lead.mean() > tie * np.sqrt((deviations**2).sum()) / len(first))

    better = [place for place, model in enumerate(right) if is_clearly_better(model)]
    return max(better, key=lambda place: float(right[place].mean()), default=0)


def verdicts(metrics: dict[str, Any]) -> list[str]:
    """Return sentences on whether fine-tuning and the final model are better than the best probe.

    They are from the metrics that evaluate writes.
    """
    chosen = metrics["chosen"]
    said = [fine_tuning_verdict(metrics["stage2_minus_probe"])]
    if chosen not in ("probe", "stage2"):
        gain = metrics["chosen_minus_probe"]
        said.append(_verdict(f"the final model, {chosen},", f"{chosen} minus probe", gain))
    return said


def fine_tuning_verdict(found: dict[str, float | None]) -> str:
    """Return a sentence on whether fine-tuning helped, from `difference` of stage 2 and probe."""
    return _verdict("fine-tuning", "stage 2 minus probe", found)


def _verdict(what: str, difference: str, found: dict[str, float | None]) -> str:
    accuracy, low, high = (found[key] for key in ("accuracy", "low", "high"))
    assert accuracy is not None
    measured = f"{difference} {100 * accuracy:+.1f} points"
    if low is None or high is None:
        return f"{what}: {measured}; {TOO_FEW}, so this says nothing about other images"
    better = "helped" if low > 0 else "hurt" if high < 0 else "made no significant difference"
    return (
        f"{what} {better}: {measured} (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p = {found['p_value']:.3f})"
    )


def interval_in_words(low: float | None, high: float | None) -> str:
    """Return the interval of an accuracy as text, or that there is none."""
    return TOO_FEW if low is None or high is None else f"{low:.3f} to {high:.3f}"
