"""Measures, validation metrics and calibration, from class scores (N, C) and labels (N,)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import rankdata

from pipeline.stage_runtime.schema import Measure

Scores = NDArray[np.floating[Any]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MEASURES: dict[str, str] = {  # in words
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "macro F1",
    "auroc": "AUROC",
    "log_loss": "log loss",
}


def validation(
    scores: Scores, labels: Ints, temperature: float = 1.0, measure: Measure = "accuracy"
) -> dict[str, float]:
    """Return accuracy, balanced accuracy and cross-entropy (nats) of a validation split.

    For another measure than accuracy, also its value and its standard error, or those of the log
    loss where it isn't defined.
    """
    predicted = scores.argmax(1)
    found = {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "loss": cross_entropy(scores, labels, temperature),
    }
    if measure == "accuracy":
        return found
    judged, values = judged_by(measure, scores / temperature, labels)
    error = {f"{judged}_error": float(values.std() / np.sqrt(len(labels)))}
    return {**found, **({} if judged == "log_loss" else {judged: float(values.mean())}), **error}


def by_image(measure: Measure, scores: Scores, labels: Ints) -> Floats | None:
    """Return a value for each image (N,) such that their mean is the measure; higher is better.

    Accuracy and log loss (here negative) are means over images. For the others, a value is the
    measure plus the image's influence on it (the delta method; for AUROC DeLong et al. 1988,
    Biometrics 44), so that the mean's standard error is that of the measure. Balanced accuracy and
    macro F1 are means over the classes that occur in `labels`. AUROC is the mean over the classes,
    each against all others; it is None if a class is missing.
    """
    log_p = log_softmax(np.asarray(scores, np.float64), axis=1)
    answers, rows = log_p.argmax(1), np.arange(len(labels))
    if measure == "accuracy":
        return np.asarray(answers == labels, np.float64)
    if measure == "log_loss":
        return np.asarray(log_p[rows, labels])
    n_classes = log_p.shape[1]
    images = np.bincount(labels, minlength=n_classes)
    if measure == "auroc":
        return None if images.min() == 0 else _auroc_by_image(np.exp(log_p), labels, images)
    occurring = int((images > 0).sum())
    right = np.bincount(labels, weights=answers == labels, minlength=n_classes)
    if measure == "balanced_accuracy":
        recall = right / np.maximum(images, 1)
        influence = ((answers == labels) - recall[labels]) / images[labels]
        return np.asarray(recall.sum() / occurring + influence * (len(labels) / occurring))
    answered = np.bincount(answers, minlength=n_classes)
    both = np.maximum(images + answered, 1)
    f1 = np.where(images > 0, 2 * right / both, 0)
    counted = np.where(images > 0, 1 / both, 0)  # an answer of another class has no F1 to lower
    influence = 2 * (answers == labels) * counted[labels]
    influence -= (f1 * counted)[labels] + (f1 * counted)[answers]
    return np.asarray(f1.sum() / occurring + influence * (len(labels) / occurring))


def _auroc_by_image(p: Floats, labels: Ints, images: Ints) -> Floats:
    """Return the value for each image (N,) from probabilities (N, C) and the class sizes (C,)."""
    n, n_classes = p.shape
    total = np.zeros(n)
    # With two classes, both have the same curve.
    asked = range(1, 2) if n_classes == 2 else range(n_classes)
    for c in asked:
        of, rest = np.flatnonzero(labels == c), np.flatnonzero(labels != c)
        ranks = rankdata(p[:, c])
        above = (ranks[of] - rankdata(p[of, c])) / len(rest)  # share of the others below each
        below = 1 - (ranks[rest] - rankdata(p[rest, c])) / len(of)
        area = above.mean()
        total += area
        total[of] += (above - area) * n / len(of)
        total[rest] += (below - area) * n / len(rest)
    return np.asarray(total / len(asked))


def judged_by(measure: Measure, scores: Scores, labels: Ints) -> tuple[Measure, Floats]:
    """Return the measure and its value for each image, or the log loss where it isn't defined."""
    values = by_image(measure, scores, labels)
    if values is None:
        loss = by_image("log_loss", scores, labels)
        assert loss is not None
        return "log_loss", loss
    return measure, values


def undefined(measure: Measure, labels: Ints, classes: list[str], where: str) -> str:
    """Return a sentence on images that a measure isn't defined on, or nothing if it is."""
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if measure != "auroc" or not len(missing):
        return ""
    return (
        f"{where} has no image of class {classes[missing[0]]!r}, so AUROC isn't defined there: log "
        "loss decides"
    )


def balanced_accuracy(labels: Ints, predicted: Ints) -> float:
    """Return the mean recall over the classes that occur in `labels`."""
    images, right = np.bincount(labels), np.bincount(labels, weights=labels == predicted)
    return float((right[images > 0] / images[images > 0]).mean())


def cross_entropy(scores: Scores, labels: Ints, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood (nats) of softmax(scores / temperature)."""
    log_p = log_softmax(np.asarray(scores, np.float64) / temperature, axis=1)
    return float(-log_p[np.arange(len(labels)), labels].mean())


def fit_temperature(scores: Scores, labels: Ints, to_one: float = 0.0) -> float:
    """Return the temperature that minimises cross-entropy (Guo et al. 2017, arXiv 1706.04599).

    With `to_one` it is drawn towards 1: this is the cost in nats of a factor of e.
    """

    def cost(log_t: float) -> float:
        likely = len(labels) * cross_entropy(scores, labels, float(np.exp(log_t)))
        return likely + to_one * log_t**2

    return float(np.exp(minimize_scalar(cost, bounds=(-4, 4), method="bounded").x))
