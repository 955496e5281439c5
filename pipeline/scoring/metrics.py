"""Validation metrics and calibration, from class scores (N, C) and labels (N,)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


def validation(scores: Scores, labels: Ints, temperature: float = 1.0) -> dict[str, float]:
    """Return accuracy, balanced accuracy and cross-entropy (nats) of a validation split."""
    predicted = scores.argmax(1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "loss": cross_entropy(scores, labels, temperature),
    }


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
