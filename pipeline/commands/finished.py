"""A finished run, as compare sees it: its params, and each model's accuracy and answers."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.commands.revision import (
    BLEND,
    MODELS,
    OUT_OF_FOLD,
    SHOWN,
    Text,
    files_of,
    images_of,
    right_of,
    shown,
    stale,
)
from pipeline.stage_runtime.schema import flat, load_yaml
from pipeline.statistics.verdict import interval_in_words

Judge = Literal["validation", "test"]
REPORT = "models/report/metrics.json"
# The predictions for each kind of images, and the name of these images.
ANSWERS = {
    "out-of-fold": (OUT_OF_FOLD, "training images, out of fold"),
    "validation": ("models/report/validation.csv", "validation images"),
    "test": ("models/report/predictions.csv", "test images"),
}
SPLIT_OF = {"validation": "val", "test": "test"}  # as index.csv and metrics.json call them


@dataclass(frozen=True)
class Run:
    """The results of a finished run."""

    name: str
    params: dict[str, Any]  # flat
    chosen: str
    accuracies: dict[str, float]  # of each model, on the images to compare on; empty without any
    # By kind of images and model: whether each image (path and content) is classified correctly.
    right: dict[str, dict[str, dict[str, bool]]]
    groups: dict[str, int] = field(default_factory=dict)  # by image
    images: dict[str, int] = field(default_factory=dict)  # by split
    stale: list[str] = field(default_factory=list)  # params it ran with, if params.yaml has others
    measured: dict[str, str] = field(default_factory=dict)  # the final model's, if not the accuracy


def read(revision: str, judge: Judge = "validation") -> Run:
    """Read the run of a revision, or of the working tree.

    Raises RunError if there is none.
    """
    with files_of(revision) as text:
        report = json.loads(text(REPORT))
        params = dict(flat(load_yaml(text("params.yaml"))))
        tested = report[SPLIT_OF[judge]]
        run = Run(
            shown(revision),
            params,
            report["chosen"],
            {m: v["accuracy"] if judge == "test" else v for m, v in tested.items()},
            {},
            stale=stale(revision, params, text),
            measured=_measured(report, judge),
        )
        return _with_answers(run, text, judge)


def _measured(report: dict[str, Any], judge: Judge) -> dict[str, str]:
    """Return the final model's measure as text by its name, if that isn't the accuracy."""
    found = report.get("measure", {"name": "accuracy"})  # earlier runs have none
    name = found["name"]
    value = None if name == "accuracy" else found["value" if judge == "test" else "val"]
    if value is None:
        return {}
    ends = interval_in_words(found["low"], found["high"])
    return {name: f"{value:.4f}" + (f" ({ends})" if judge == "test" else "")}


def _with_answers(run: Run, text: Text, judge: Judge) -> Run:
    """Add the predictions of a run's models, as far as DVC's cache has them."""
    images = images_of(run.name, text)
    kinds = ("test",) if judge == "test" else ("out-of-fold", "validation")
    found = {kind: right_of(run.name, text, ANSWERS[kind][0], images) for kind in kinds}
    return replace(
        run,
        right={kind: right for kind, right in found.items() if right is not None},
        groups={image.key: image.group for image in images.values()},
        images=dict(Counter(image.split for image in images.values())),
    )


def alike_but_for(name: str, runs: Iterable[Run]) -> list[list[Run]]:
    """Group the runs that differ only in one param."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.params.items() if key != name}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def changed(run: Run, base: Run) -> list[str]:
    """Describe which params differ, the old value first."""
    keys = [key for key in {**base.params, **run.params} if _value(base, key) != _value(run, key)]
    said = [f"{key} {_value(base, key)} → {_value(run, key)}" for key in keys]
    return said if len(said) <= SHOWN else [*said[:SHOWN], f"and {len(said) - SHOWN} more"]


def _value(run: Run, key: str) -> str:
    return json.dumps(run.params[key], default=str) if key in run.params else "none"


def models_of(runs: Iterable[Run]) -> list[str]:
    """Return the models to compare; earlier runs have no blend."""
    blended = any(BLEND in run.accuracies for run in runs)
    return [model for model in MODELS if blended or model != BLEND]
