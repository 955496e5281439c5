"""A mixture of models: the weighted mean of their calibrated probabilities (a linear pool).

All its numbers are fitted on validation images, of which there may be thirty. So each one is drawn
towards a value that is good without any: the temperatures to 1, the weights to equal ones. The
strength of both was chosen on eight data sets, with 30, 100 and all of the validation images:
docs/results.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.model_selection import GroupKFold

from pipeline.scoring.metrics import fit_temperature

Floats = NDArray[np.float64]
Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# For temperatures, in nats at a factor of e: thirty images that are all right would ask for 0.
TO_ONE = 2.0
IMAGES = 3.0  # that speak for each model before any image is seen
LEAST_WEIGHT = 0.05  # a model of less is left out: it costs time at each prediction
STEPS, CHANGE = 1000, 1e-9  # where the search for weights ends: at most so many, or so small
FOLDS = 5


@dataclass(frozen=True)
class Mixture:
    """The weights and temperatures with which models are averaged."""

    weights: list[float]  # of each model; their sum is 1, and some may be 0
    temperatures: list[float]  # of each model
    temperature: float  # of their mean

    def log_probabilities(self, scores: Sequence[Scores]) -> Floats:
        """Return logarithms of calibrated probabilities (N, C) from each model's scores (N, C)."""
        found = mean_log(scores, self.weights, self.temperatures)
        return np.asarray(log_softmax(found / self.temperature, axis=1))


def mean_log(
    scores: Sequence[Scores], weights: Sequence[float], temperatures: Sequence[float]
) -> Floats:
    """Return the logarithm (N, C) of the weighted mean of the models' probabilities."""
    each = [log_softmax(s / t, axis=1) for s, t in zip(scores, temperatures, strict=True)]
    return np.asarray(logsumexp(each, axis=0, b=np.reshape(weights, (-1, 1, 1))))


def fit_mixture(scores: Sequence[Scores], labels: Ints) -> Mixture:
    """Fit a mixture to the scores (N, C) of each model, and labels (N,).

    Weights maximise the likelihood of the labels times a Dirichlet density, by
    expectation-maximisation (Dempster, Laird and Rubin 1977). One model is only calibrated.
    """
    temperatures = [fit_temperature(s, labels, TO_ONE) for s in scores]
    if len(scores) == 1:
        return Mixture([1.0], temperatures, 1.0)
    rows = np.arange(len(labels))
    of_label = np.stack(
        [
            log_softmax(s / t, axis=1)[rows, labels]
            for s, t in zip(scores, temperatures, strict=True)
        ],
        axis=1,
    )  # (N, models)
    weights = np.full(len(scores), 1 / len(scores))
    for _ in range(STEPS):
        new = IMAGES + softmax(of_label + np.log(weights), axis=1).sum(0)
        new /= new.sum()
        done = np.abs(new - weights).max() < CHANGE
        weights = new
        if done:
            break
    weights = np.where(weights < LEAST_WEIGHT, 0.0, weights)
    weights /= weights.sum()
    mixed = mean_log(scores, weights.tolist(), temperatures)
    return Mixture(weights.tolist(), temperatures, fit_temperature(mixed, labels, TO_ONE))


def cross_fitted(scores: Sequence[Scores], labels: Ints, groups: Ints) -> Floats:
    """Return a mixture's log probabilities (N, C), each from a fit to other groups of images.

    So they are those of new images. With a single group, they are of a fit to all.
    """
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        return fit_mixture(scores, labels).log_probabilities(scores)
    found = np.empty(np.shape(scores[0]))
    for fitted, held in GroupKFold(min(FOLDS, n_groups)).split(labels, groups=groups):
        mixture = fit_mixture([s[fitted] for s in scores], labels[fitted])
        found[held] = mixture.log_probabilities([s[held] for s in scores])
    return found
