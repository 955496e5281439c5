"""The models' answers, one line per image: predictions.csv, validation.csv, out_of_fold.csv."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.images.rows import Rows

Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


ANSWER = "answer"  # the column of the chosen model's answers, if they aren't its likeliest classes


@dataclass(frozen=True)
class Sureness:
    """The answers (N,) of the chosen model, and its log probabilities (N, C)."""

    answers: Ints
    calibrated: Scores
    uncalibrated: Scores


def answer_lines(
    rows: Rows,
    scores: Mapping[str, Scores],
    chosen: str,
    sureness: Sureness,
    classes: Sequence[str],
    more: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Sequence[object]]:
    """Yield each model's answers from its scores (N, C), and the confidence of the chosen model.

    If a model's scores are NaN, it didn't answer, and the cell is empty. `more` are columns (N,)
    after them.
    """
    more = more or {}
    yield "id", "path", "label", *scores, "probability", "uncalibrated", *more
    answered = {model: ~np.isnan(s[:, 0]) for model, s in scores.items()}
    answers = {model: s.argmax(1) for model, s in scores.items()}
    given = sureness.answers
    each = np.arange(len(given))
    p, raw = (np.exp(s[each, given]) for s in (sureness.calibrated, sureness.uncalibrated))
    for i, label in enumerate(rows.labels):
        said = (classes[answers[m][i]] if answered[m][i] else "" for m in scores)
        sure = (f"{p[i]:.6f}", f"{raw[i]:.6f}") if answered[chosen][i] else ("", "")
        rest = (column[i] for column in more.values())
        yield rows.ids[i], rows.paths[i], classes[label], *said, *sure, *rest


def read_answers(
    predictions: Sequence[Mapping[str, str]], model: str
) -> tuple[NDArray[np.float64], list[str], NDArray[np.bool_]]:
    """Return a model's confidence, its answers, and which of them are right, for each image.

    If the file has a column of answers, those.
    """
    sure = np.array([float(row["probability"]) for row in predictions])
    answers = [row.get(ANSWER, row[model]) for row in predictions]
    right = [answer == row["label"] for answer, row in zip(answers, predictions, strict=True)]
    return sure, answers, np.array(right, bool)
