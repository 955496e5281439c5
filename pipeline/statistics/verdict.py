"""Test metrics of a model, the choice of the final model, and the verdict in words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from pipeline.scoring.metrics import MEASURES, by_image
from pipeline.stage_runtime.schema import Measure

Scores = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
TOO_FEW = "too few groups for an interval"


def model_scores(scores: Scores, labels: Ints, weights: NDArray[np.float64]) -> dict[str, Any]:
    """Return the test metrics of one model; AUROC is null if a class is missing."""
    right = scores.argmax(1) == labels

    def of(measure: Measure) -> float | None:
        values = by_image(measure, scores, labels)
        return None if values is None else float(values.mean())

    return {
        "accuracy": float(right.mean()),
        "accuracy_weighted": float((right * weights).sum() / weights.sum()),
        "balanced_accuracy": of("balanced_accuracy"),
        "f1_macro": of("f1_macro"),
        "auroc": of("auroc"),
    }


def confusion(scores: Scores, labels: Ints) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): (C, C)."""
    counts: NDArray[np.int64] = confusion_matrix(
        labels, scores.argmax(1), labels=np.arange(scores.shape[1])
    )
    return counts


def first_unless_clearly_worse(
    values: Sequence[Bools | Scores], groups: Ints, tie: float, losses: Sequence[float] = ()
) -> int:
    """Choose among models, the one to trust most first, by a measure's value for each image (N,).

    Returns the position of the first model, unless others are more than `tie` standard errors
    better: then of the best of them, and of equals the one with the lowest loss. A few hundred
    validation images can't tell good models apart, so a smaller lead is mostly luck. The standard
    error is that of the paired difference, over groups of images.
    """
    first = values[0].astype(float)
    _, of = np.unique(groups, return_inverse=True)

    def is_clearly_better(model: Bools | Scores) -> bool:
        lead = model - first
        deviations = np.bincount(of, weights=lead - lead.mean())
        return bool(lead.mean() > tie * np.sqrt((deviations**2).sum()) / len(first))

    def quality(place: int) -> tuple[float, float]:
        return float(values[place].mean()), -losses[place] if losses else 0.0

    better = [place for place, model in enumerate(values) if is_clearly_better(model)]
    return max(better, key=quality, default=0)


def verdicts(metrics: dict[str, Any]) -> list[str]:
    """Return sentences on whether fine-tuning and the final model are better than the best probe.

    They are from the metrics that evaluate writes: by the measure, if that isn't the accuracy, and
    by the accuracy.
    """
    chosen, measured = metrics["chosen"], metrics["measure"]
    asked = measured["name"]
    of_measure = measured.get("stage2_minus_probe")
    pairs = {"stage2_minus_probe": ("fine-tuning", "stage 2 minus probe")}
    if chosen not in ("probe", "stage2"):
        pairs["chosen_minus_probe"] = (f"the final model, {chosen},", f"{chosen} minus probe")
    said = []
    for key, what in pairs.items():
        if of_measure:
            said.append(_verdict(*what, measured[key], asked))
        said.append(_verdict(*what, metrics[key], "accuracy" if of_measure else ""))
    return said


def fine_tuning_verdict(found: dict[str, float | None]) -> str:
    """Return a sentence on whether fine-tuning helped, from `difference` of stage 2 and probe."""
    return _verdict("fine-tuning", "stage 2 minus probe", found)


def _verdict(what: str, difference: str, found: dict[str, float | None], measure: str = "") -> str:
    """Return a sentence on a difference of accuracies, or of another measure."""
    value, low, high = found.get("value", found.get("accuracy")), found["low"], found["high"]
    assert value is not None
    is_loss = measure == "log_loss"
    scale, unit = (1, f"nats of {MEASURES['log_loss']}") if is_loss else (100, "points")
    if measure and not is_loss:
        unit += f" of {MEASURES[measure]}"
    form = "+.3f" if is_loss else "+.1f"
    measured = f"{difference} {scale * value:{form}} {unit}"
    if low is None or high is None:
        return f"{what}: {measured}; {TOO_FEW}, so this says nothing about other images"
    up, down = ("hurt", "helped") if is_loss else ("helped", "hurt")
    better = up if low > 0 else down if high < 0 else "made no significant difference"
    return (
        f"{what} {better}: {measured} (95 % interval {scale * low:{form}} to "
        f"{scale * high:{form}}, p = {found['p_value']:.3f})"
    )


def measure_in_words(measured: dict[str, Any]) -> str:
    """Return the final model's measure on test with its interval as text."""
    value, low, high = (measured[key] for key in ("value", "low", "high"))
    said = f"{MEASURES[measured['name']]} of the final model"
    if value is None:
        return f"{said}: not defined, as a class has no test image"
    ends = TOO_FEW if low is None else f"95 % interval {low:.4f} to {high:.4f}"
    return f"{said}: {value:.4f} ({ends})"


def interval_in_words(low: float | None, high: float | None) -> str:
    """Return the interval of an accuracy as text, or that there is none."""
    return TOO_FEW if low is None or high is None else f"{low:.3f} to {high:.3f}"
