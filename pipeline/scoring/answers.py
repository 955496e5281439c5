"""The models' answers, one line per image: predictions.csv, validation.csv, out_of_fold.csv."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.rows import Rows

Scores = NDArray[np.floating[Any]]


def answer_lines(
    rows: Rows,
    scores: Mapping[str, Scores],
    chosen: str,
    calibrated: Scores,
    uncalibrated: Scores,
    classes: Sequence[str],
) -> Iterator[Sequence[object]]:
    """Yield each model's answers from its scores (N, C), and the confidence of the chosen model.

    `calibrated` and `uncalibrated` are its log probabilities (N, C). If a model's scores are NaN,
    it didn't answer, and the cell is empty.
    """
    yield "id", "path", "label", *scores, "probability", "uncalibrated"
    answered = {model: ~np.isnan(s[:, 0]) for model, s in scores.items()}
    answers = {model: s.argmax(1) for model, s in scores.items()}
    p, raw = (np.exp(log_p.max(1)) for log_p in (calibrated, uncalibrated))
    for i, label in enumerate(rows.labels):
        said = (classes[answers[m][i]] if answered[m][i] else "" for m in scores)
        sure = (f"{p[i]:.6f}", f"{raw[i]:.6f}") if answered[chosen][i] else ("", "")
        yield rows.ids[i], rows.paths[i], classes[label], *said, *sure


def read_answers(
    predictions: Sequence[Mapping[str, str]], model: str
) -> tuple[NDArray[np.float64], list[str], NDArray[np.bool_]]:
    """Return a model's confidence, its answers, and which of them are right, for each image."""
    sure = np.array([float(row["probability"]) for row in predictions])
    answers = [row[model] for row in predictions]
    right = [answer == row["label"] for answer, row in zip(answers, predictions, strict=True)]
    return sure, answers, np.array(right, bool)
