"""Runs that differ only in their fold: their test images together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.commands.differences import Against, interval, paired, said
from pipeline.commands.finished import Run, alike_but_for, changed, models_of
from pipeline.commands.revision import FOLD
from pipeline.commands.table import aligned
from pipeline.statistics.verdict import interval_in_words

CAVEAT = (
    "each model was trained and validated on the other folds: this is how good such a model is",
    "folds share training images, which the intervals don't count: over other training images they "
    "are somewhat too narrow (Bates et al. 2021, arXiv 2104.00673)",
)


@dataclass(frozen=True)
class Folds:
    """Runs that test the folds of one data set, with their answers together."""

    runs: Sequence[Run]
    of: int  # the number of folds, of which some may be missing

    @property
    def name(self) -> str:
        """Return the first run's name."""
        return self.runs[0].name

    def right(self, model: str) -> dict[str, bool]:
        """Return whether each tested image is classified correctly, by a model or the final one."""
        each = ((run.right.get("test", {}), run.chosen) for run in self.runs)
        answers = (found.get(chosen if model == "chosen" else model, {}) for found, chosen in each)
        return {image: right for found in answers for image, right in found.items()}

    @property
    def groups(self) -> dict[str, int]:
        """Return each image's group."""
        return self.runs[0].groups

    def accuracy(self, model: str) -> tuple[float, float | None, float | None] | None:
        """Return a model's accuracy over all tested images and its interval, if it has answers."""
        right = self.right(model)
        if not right:
            return None
        return (sum(right.values()) / len(right), *interval(right, self.groups))

    def facts(self) -> dict[str, Any]:
        """Return what is known of them, for JSON."""
        tested = self.right("chosen")
        named = {model: self.accuracy(model) for model in ("chosen", *models_of(self.runs))}
        ends = ("accuracy", "low", "high")
        return {
            "run": self.name,
            "folds": len(self.runs),
            "of": self.of,
            "images": len(tested),
            "groups": len({self.groups[image] for image in tested}),
            "accuracy": {
                m: dict(zip(ends, found, strict=True)) for m, found in named.items() if found
            },
        }


def folds_of(runs: Sequence[Run]) -> list[Folds]:
    """Group the runs that differ only in their fold; a run alone is no group."""
    found = []
    for alike in alike_but_for(FOLD, [run for run in runs if run.params.get(FOLD)]):
        by_number: dict[str, dict[str, Run]] = {}
        for run in alike:
            number, _, of = str(run.params[FOLD]).partition("/")
            by_number.setdefault(of, {}).setdefault(number, run)
        found += [Folds(list(g.values()), int(of)) for of, g in by_number.items() if len(g) > 1]
    return found


def pooled(all_folds: Sequence[Folds]) -> list[str]:
    """Return a table of the accuracies over the test images of all folds, and what it means."""
    each = [folds.facts() for folds in all_folds]
    models = dict.fromkeys(model for one in each for model in one["accuracy"])
    if not models:
        return ["DVC's cache lacks the predictions of the folds"]
    return [
        *aligned(
            [
                ["all folds together", *(one["run"] for one in each)],
                ["folds", *(f"{one['folds']} of {one['of']}" for one in each)],
                ["test images", *(f"{one['images']:,} in {one['groups']} groups" for one in each)],
                *([model, *(_cell(one["accuracy"], model) for one in each)] for model in models),
            ]
        ),
        *CAVEAT,
    ]


def _cell(accuracies: dict[str, Any], model: str) -> str:
    if model not in accuracies:
        return "-"
    accuracy, low, high = accuracies[model].values()
    return f"{accuracy:.4f} ({interval_in_words(low, high)})"


def of_folds(all_folds: Sequence[Folds]) -> list[Against]:
    """Compare each group's final models with the first group's, image by image."""
    found = []
    for folds in all_folds[1:]:
        ours, theirs = (side.right("chosen") for side in (folds, all_folds[0]))
        if ours and ours.keys() == theirs.keys():
            names = (folds.name, ours), (all_folds[0].name, theirs)
            found.append(paired("chosen", *names, folds.groups, "test images of all folds"))
    return found


def differences_of(all_folds: Sequence[Folds], found: Sequence[Against]) -> Iterator[str]:
    """Describe how groups of folds differ from the first."""
    base = all_folds[0]
    for one in found:
        (folds,) = (folds for folds in all_folds if folds.name == one.run)
        params = changed(folds.runs[0], base.runs[0])
        told = ", ".join(param for param in params if not param.startswith(FOLD)) or "same params"
        yield f"{one.run} and its folds against {one.base}'s: {told}"
        yield said(one)
