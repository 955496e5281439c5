"""Rank the backbones of runs by their probes: accuracy, seconds an image, size, licence.

    python -m pipeline sweep -S backbone.name=timm/NAME,torchvision/NAME --to probe
    python -m pipeline rank                  # the last commit, and all experiments on it
    python -m pipeline rank . exp-a exp-b    # or these commits, branches, tags or experiments
    python -m pipeline rank --json

A run's accuracy is that of its best probe, by cross-validation on the training images; validation
and test images are not used. Runs with the same training images are compared with the first one,
image by image. Because the first one is chosen by the same images, p-values are raised by Holm's
method for all pairs of runs, not only for those that are shown.

Seconds are those of `extract` in each run, with all its views: runs on different machines, or with
different numbers of threads, can't be compared by them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from pipeline.commands.differences import Against, corrected, interval, paired
from pipeline.commands.revision import (
    OUT_OF_FOLD,
    RunError,
    experiments,
    files_of,
    images_of,
    note,
    right_of,
    shown,
    stale,
)
from pipeline.commands.table import aligned
from pipeline.launcher.command import one_line_errors, parser_of
from pipeline.nets.automatic import input_size
from pipeline.nets.backbone import licence_of, skeleton
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import flat, load_yaml
from pipeline.statistics.verdict import interval_in_words

UP_TO_PROBE = ("prepare", "extract", "probe")


@dataclass(frozen=True)
class Probed:
    """A run up to its probe."""

    name: str
    backbone: str
    weights: str
    accuracy: float  # of the best probe, out of fold
    seconds: float | None  # an image, in extract; None if it took all codes from a cache
    image_size: int  # pixels
    parameters: int  # with a head for ImageNet's classes
    licence: str
    right: dict[str, bool] = field(repr=False, default_factory=dict)  # by image
    groups: dict[str, int] = field(repr=False, default_factory=dict)  # by image
    low: float | None = None
    high: float | None = None


def read(revision: str) -> Probed:
    """Read the probe of a revision, or of the working tree.

    Raises RunError if there is none.
    """
    with files_of(revision) as text:
        params = dict(flat(load_yaml(text("params.yaml"))))
        if stale(revision, params, text, UP_TO_PROBE):
            raise RunError(f"{shown(revision)}: its probe belongs to other params; run `dvc repro`")
        metrics = json.loads(text("models/probe/metrics.json"))["probe"]
        speed = json.loads(text("models/extract/timing.json"))["extract"]
        images = images_of(revision, text)
        right = (right_of(revision, text, OUT_OF_FOLD, images) or {}).get("probe", {})
    name, weights = params["backbone.name"], params["backbone.weights"]
    model = skeleton(name)
    per_second = speed.get("images_per_second")
    found = Probed(
        shown(revision),
        name,
        weights,
        metrics["cv_accuracy"],
        1 / per_second if per_second else None,
        input_size(model, params["extract.image_size"], params["prepare.size"]),
        sum(p.numel() for p in model.parameters()),
        licence_of(name, weights),
        right,
        {image.key: image.group for image in images.values()},
    )
    if not right:
        return found
    low, high = interval(right, found.groups)
    return replace(found, accuracy=sum(right.values()) / len(right), low=low, high=high)


def ranked(runs: Sequence[Probed]) -> list[tuple[Probed, Against | None]]:
    """Sort runs by accuracy, the best first, and compare each with the first one.

    P-values are corrected for all pairs.
    """
    order = sorted(runs, key=lambda run: (-run.accuracy, run.seconds or 0.0))
    # The first run's pairs come first.
    of_all = corrected([_behind(run, better) for better, run in combinations(order, 2)])
    return list(zip(order, [None, *of_all], strict=False))


def _behind(run: Probed, better: Probed) -> Against:
    if not run.right or run.right.keys() != better.right.keys():
        apart, on = run.accuracy - better.accuracy, "other training images"
        return Against("probe", run.name, better.name, apart, None, None, None, on)
    sides = (run.name, run.right), (better.name, better.right)
    return paired("probe", *sides, run.groups, "training images, out of fold")


def table(found: Sequence[tuple[Probed, Against | None]]) -> list[str]:
    """Return the ranking as the lines of a table, and what follows from it."""
    rows = [
        ["run", "backbone", "accuracy", "against the first", "ms", "px", "params", "licence"],
        *(
            [
                run.name,
                run.backbone if run.weights == "imagenet" else f"{run.backbone} ({run.weights})",
                _with_interval(run),
                _in_words(behind),
                "-" if run.seconds is None else f"{1000 * run.seconds:.1f}",
                str(run.image_size),
                f"{run.parameters / 1e6:.1f} M",
                run.licence,
            ]
            for run, behind in found
        ),
    ]
    return [*aligned(rows, right=(4, 5, 6)), *_conclusion(found)]


def _with_interval(run: Probed) -> str:
    ends = f" ({interval_in_words(run.low, run.high)})" if run.right else ""
    return f"{run.accuracy:.4f}{ends}"


def _in_words(behind: Against | None) -> str:
    if behind is None:
        return "the first"
    points = f"{100 * behind.accuracy:+.1f}"
    if behind.low is None or behind.high is None:
        return f"{points}: {behind.verdict}"
    return f"{points} ({100 * behind.low:+.1f} to {100 * behind.high:+.1f}): {behind.verdict}"


def _conclusion(found: Sequence[tuple[Probed, Against | None]]) -> list[str]:
    equal = [run for run, behind in found if behind is None or behind.noise]
    timed = [run for run in equal if run.seconds is not None]
    if len(equal) < 2 or len(timed) < len(equal):
        return []
    fastest = min(timed, key=lambda run: run.seconds or 0.0)
    return [
        "",
        f"{len(equal)} of {len(found)} can't be told from the first; of these, {fastest.name} "
        f"({fastest.backbone}) is the fastest",
    ]


def main() -> None:
    """Print the ranking."""
    parser = parser_of("rank", __doc__ or "")
    parser.add_argument("revisions", nargs="*", metavar="REV", help="(default: HEAD and all on it)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with one_line_errors():
        revisions = options.revisions or ["HEAD", *experiments()]
        runs = list(_readable(revisions, strict=bool(options.revisions)))
        if not runs:
            raise RunError("no run with a probe; run `dvc repro probe`, and commit")
        found = ranked(runs)
        if options.json:
            print(json.dumps([_as_json(run, behind) for run, behind in found], indent=2))
            return
        for line in table(found):
            say(line)


def _readable(revisions: Sequence[str], strict: bool) -> Iterator[Probed]:
    """Yield the probes of revisions; those that have none are named, unless `strict`."""
    for revision in revisions:
        try:
            yield read(revision)
        except RunError as error:
            if strict:
                raise
            note(f"left out: {error}")


def _as_json(run: Probed, behind: Against | None) -> dict[str, Any]:
    facts = {k: v for k, v in vars(run).items() if k not in ("right", "groups")}
    against = behind and {
        key: getattr(behind, key) for key in ("accuracy", "low", "high", "p_value", "noise")
    }
    return {**facts, "against_first": against}
