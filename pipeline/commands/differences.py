"""The difference of two runs on the same images, and whether it is more than noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.statistics.significance import accuracy_interval, difference, holm

NOISE = 0.05  # p from which a difference counts as noise
Right = Mapping[str, bool]  # by image, whether it is classified correctly
Groups = Mapping[str, int]  # by image


@dataclass(frozen=True)
class Against:
    """The comparison of a model of one run with the same model of another."""

    model: str
    run: str
    base: str
    accuracy: float  # the difference
    low: float | None
    high: float | None
    p_value: float | None  # None: it can't be tested
    on: str  # which images, or why it can't be tested

    @property
    def noise(self) -> bool | None:
        """Return whether it is no more than noise; None if it can't be tested."""
        return None if self.p_value is None else self.p_value >= NOISE

    @property
    def verdict(self) -> str:
        """Say whether it is more than noise."""
        if self.noise is None:
            return "can't be distinguished from noise"
        return "no more than noise" if self.noise else "more than noise"


def paired(
    model: str, run: tuple[str, Right], base: tuple[str, Right], groups: Groups, on: str
) -> Against:
    """Compare two runs, each a name and its answers, image by image, without correction."""
    (name, ours), (base_name, theirs) = run, base
    images = sorted(ours)
    a, b = (np.array([right[image] for image in images]) for right in (ours, theirs))
    found = difference(a, b, _groups_of(images, groups))
    gap, low, high, p = (found[key] for key in ("accuracy", "low", "high", "p_value"))
    assert gap is not None
    on = f"{len(images):,} {on}" + (", in too few groups" if p is None else "")
    return Against(model, name, base_name, gap, low, high, p, on)


def interval(right: Right, groups: Groups) -> tuple[float | None, float | None]:
    """Return the 95 % interval of an accuracy, from the answers; None twice for too few groups."""
    images = sorted(right)
    answers = np.array([right[image] for image in images])
    return accuracy_interval(answers, _groups_of(images, groups)) or (None, None)


def _groups_of(images: Sequence[str], groups: Groups) -> NDArray[np.int64]:
    return np.array([groups[image] for image in images])


def said(one: Against) -> str:
    """Describe a comparison in a line."""
    points = f"{one.model:<13} {100 * one.accuracy:+5.1f} points "
    if one.low is None or one.high is None or one.p_value is None:
        return f"{points}({one.on}): {one.verdict}"
    ends = f"{100 * one.low:+.1f} to {100 * one.high:+.1f}; p = {one.p_value:.3f}"
    return f"{points}({ends}; {one.on}): {one.verdict}"


def corrected(found: Sequence[Against]) -> list[Against]:
    """Correct the p-values of comparisons that are made together."""
    tested = [one.p_value for one in found if one.p_value is not None]
    raised = iter(holm(tested))
    p_values = [None if one.p_value is None else next(raised) for one in found]
    return [replace(one, p_value=p) for one, p in zip(found, p_values, strict=True)]
