"""The operating point: from probabilities to answers, for those who need something of a class.

`recall CLASS 0.95` and `precision CLASS 0.9` answer with a class if its probability is at least a
threshold, else with the likeliest of the others. `cost ACTUAL>ANSWER=10, ...` gives the answer with
the lowest expected cost; the mistakes that aren't named cost 1.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.scoring.answers import ANSWER
from pipeline.stage_runtime.errors import ParamError, suggest
from pipeline.statistics.significance import accuracy_interval
from pipeline.statistics.verdict import interval_in_words

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Kind = Literal["recall", "precision", "cost"]

PARAM = "evaluate.operating_point"
POSITIVE = "positive"  # the column of the probability of the class that recall or precision are of
FORMS = "recall CLASS 0.95, precision CLASS 0.9, cost ACTUAL>ANSWER=10, or none"


@dataclass(frozen=True)
class OperatingPoint:
    """What is asked, and what was fitted for it."""

    kind: Kind
    asked: str
    positive: int | None = None  # the class that recall or precision are of
    level: float | None = None
    threshold: float | None = None  # of its probability
    costs: list[list[float]] | None = None  # of an answer (column) where a class is right (row)

    def answers(self, probabilities: Floats) -> Ints:
        """Return the answers (N,) from probabilities (N, C)."""
        if self.costs is not None:
            expected = probabilities @ np.asarray(self.costs)
            return np.asarray(expected.argmin(1))
        assert self.positive is not None
        assert self.threshold is not None
        others = probabilities.copy()
        others[:, self.positive] = -1.0
        is_positive = probabilities[:, self.positive] >= self.threshold
        return np.where(is_positive, self.positive, others.argmax(1))

    def words(self, classes: Sequence[str]) -> str:
        """Say how it answers."""
        if self.positive is None:
            return f"the answer of the lowest expected cost ({self.asked})"
        return (
            f"{classes[self.positive]} if its probability is at least {self.threshold:.4f}, else "
            f"the likeliest of the others ({self.asked})"
        )

    def columns(self, log_p: Floats, answers: Ints, classes: Sequence[str]) -> dict[str, list[str]]:
        """Return columns (N,) of a table: the answers, and the probabilities of its class."""
        found = {ANSWER: [classes[answer] for answer in answers]}
        if self.positive is not None:
            found[POSITIVE] = [f"{p:.6f}" for p in np.exp(log_p[:, self.positive])]
        return found


@dataclass(frozen=True)
class Decision:
    """How a classifier answers, and how probable an answer must be to be sure."""

    sure_above: list[float | None]  # for each answer; None: nothing can be promised of it
    point: OperatingPoint | None = None  # None: the likeliest class

    def answers(self, probabilities: Floats) -> Ints:
        """Return the answers (N,) from probabilities (N, C)."""
        return probabilities.argmax(1) if self.point is None else self.point.answers(probabilities)

    def is_sure(self, probability: float, answer: int) -> bool | None:
        """Return whether an answer is sure, or None if nothing can be promised of it."""
        above = self.sure_above[answer]
        return None if above is None else probability >= above

    def facts(self) -> dict[str, Any]:
        """Return it for the metadata of a file."""
        return {"sure_above": self.sure_above, "point": self.point and asdict(self.point)}

    @classmethod
    def of_facts(cls, facts: dict[str, Any], n_classes: int) -> "Decision":
        """Read it from the metadata; earlier versions had one threshold for all answers."""
        above, point = facts["sure_above"], facts.get("point")
        limits = list(above) if isinstance(above, list) else [above] * n_classes
        return cls(limits, OperatingPoint(**point) if point else None)


def asked_for(asked: str, classes: Sequence[str]) -> OperatingPoint | None:
    """Read the param; a recall or precision still needs its threshold.

    Raises ParamError naming what is wrong.
    """
    if asked == "none":
        return None
    kind, _, rest = asked.strip().partition(" ")
    if kind == "cost":
        return OperatingPoint("cost", asked, costs=_costs(rest, classes))
    name, _, number = rest.rpartition(" ")
    if kind not in ("recall", "precision") or not name:
        raise ParamError(f"{PARAM} = {asked!r}: expected {FORMS}")
    level = _number(number)
    if level is None or not 0 < level < 1:
        raise ParamError(f"{PARAM} = {asked!r}: expected a number between 0 and 1, not {number!r}")
    positive = _class(name.strip(), classes)
    return OperatingPoint("recall" if kind == "recall" else "precision", asked, positive, level)


def _class(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise ParamError(f"{PARAM}: no class is called {name!r}; {suggest(name, classes)}")
    return list(classes).index(name)


def _number(text: str) -> float | None:
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def _costs(text: str, classes: Sequence[str]) -> list[list[float]]:
    costs = 1 - np.eye(len(classes))
    for part in text.split(","):
        pair, _, number = part.rpartition("=")
        actual, arrow, answer = (word.strip() for word in pair.partition(">"))
        cost = _number(number)
        if not arrow or cost is None or cost < 0:
            raise ParamError(f"{PARAM}: {part.strip()!r} is no cost; expected ACTUAL>ANSWER=10")
        costs[_class(actual, classes), _class(answer, classes)] = cost
    return [[float(cost) for cost in row] for row in costs]


def fitted(
    asked: OperatingPoint, probabilities: Floats, labels: Ints
) -> tuple[OperatingPoint | None, str]:
    """Fit the threshold that is asked for to validation images (N, C), or say why there is none."""
    if asked.kind == "cost":
        return asked, ""
    threshold = _threshold(asked, probabilities, labels)
    if threshold is not None:
        return replace(asked, threshold=threshold), ""
    has = int((labels == asked.positive).sum())
    return None, (
        f"{asked.asked}: not supported by the {has} validation images of the class (it takes "
        f"{_images_needed(asked)} or more); the likeliest class is the answer"
    )


def _threshold(point: OperatingPoint, probabilities: Floats, labels: Ints) -> float | None:
    """Fit the threshold of a recall or precision on validation images, or None if they are too few.

    For a recall it is the highest threshold that keeps it in the mean over draws of such images:
    of n of the class, the k-th lowest probability with k = (n + 1) (1 - level) rounded down (split
    conformal prediction, Vovk et al. 2005). For a precision it is the lowest threshold above which
    the share of right answers, with one wrong one added, is at least the level.
    """
    assert point.positive is not None
    assert point.level is not None
    p = probabilities[:, point.positive]
    right = labels == point.positive
    if point.kind == "recall":
        lowest = np.sort(p[right])
        k = math.floor((len(lowest) + 1) * (1 - point.level) + 1e-9)
        return float(lowest[k - 1]) if k else None
    order = np.argsort(-p, kind="stable")
    share = right[order].cumsum() / (np.arange(len(p)) + 2)
    # A threshold includes all images of its probability.
    last = np.searchsorted(-p[order], -p[order], side="right") - 1
    enough = np.flatnonzero(share[last] >= point.level)
    return float(p[order][enough[-1]]) if len(enough) else None


def _images_needed(point: OperatingPoint) -> int:
    """Return how many validation images of the class a level takes at least."""
    assert point.level is not None
    if point.kind == "recall":
        return math.ceil(1 / (1 - point.level) - 1e-9) - 1
    return math.ceil(point.level / (1 - point.level) - 1e-9)


def at_point(
    point: OperatingPoint, probabilities: Floats, labels: Ints, groups: Ints
) -> dict[str, Any]:
    """Return what the answers (N,) at an operating point are worth, with 95 % intervals.

    Recall and precision are of its class. A share of no images, and an interval from too few
    groups, are null.
    """
    answers = point.answers(probabilities)
    right = answers == labels
    found = _share("accuracy", right, groups)
    if point.positive is not None:
        of_class, answered = labels == point.positive, answers == point.positive
        found |= _share("recall", right[of_class], groups[of_class])
        found |= _share("precision", right[answered], groups[answered])
    if point.costs is not None:
        costs = np.asarray(point.costs)
        found["cost"] = float(costs[labels, answers].mean())
        found["cost_of_the_likeliest"] = float(costs[labels, probabilities.argmax(1)].mean())
    return found


def _share(name: str, right: Bools, groups: Ints) -> dict[str, float | None]:
    low, high = (accuracy_interval(right, groups) if len(right) else None) or (None, None)
    value = float(right.mean()) if len(right) else None
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def at_point_in_words(point: OperatingPoint, found: dict[str, Any], classes: Sequence[str]) -> str:
    """Return a line of what evaluate's metrics say of an operating point."""
    split = "test" if "test" in found else "val"
    where, at = {"test": "test", "val": "validation"}[split], found[split]
    said = []
    for name in ("recall", "precision", "accuracy"):
        if at.get(name) is not None:
            interval = interval_in_words(at[f"{name}_low"], at[f"{name}_high"])
            said.append(f"{name} {at[name]:.3f} ({interval})")
    if "cost" in at:
        said.append(f"cost {at['cost']:.3f} an image ({at['cost_of_the_likeliest']:.3f} without)")
    return f"{point.words(classes)}; on {where}: {', '.join(said)}"
