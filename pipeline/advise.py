"""Advise: which of four cases the data are, and the expected gain and run time of fine-tuning.

The cases are those of the CS231n notes on transfer learning: few or many images, similar to the
data that the weights were trained on or not.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Interval

from pipeline.advice.prior_results import LARGE, OURS, PUBLISHED, Expected, expected_gain
from pipeline.advice.throughput import Throughput, measure
from pipeline.advice.transferability import Transferability, case_of, profile, transferability
from pipeline.images.augment import Augment, views
from pipeline.images.shards import SPLITS, read_facts, read_splits
from pipeline.nets.automatic import STAGE_2_AT, input_size
from pipeline.nets.device import set_up_torch
from pipeline.nets.fuse import Precision, resolved
from pipeline.probing.codes import SOURCE, read_codes, read_feature_facts, read_labels
from pipeline.stage_runtime.files import write_csv, write_json, write_text
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import Auto, Key, Out, Seed
from pipeline.training.head import head_views
from pipeline.training.interpolate import FACTORS
from pipeline.training.schedule import Epochs, epochs_of
from pipeline.training.start import start_network, what_trains

Size = Annotated[int, Interval(ge=16, le=2048)]
MOST = 10_000  # images, evenly spaced, on which the source's predictions are evaluated

WON = sum(k.fine_tuned > (k.scratch or 0) for k in PUBLISHED)
PRETRAINED_WON = f"pretrained weights were better on {WON} of {len(PUBLISHED)} published data sets"

# What the notes recommend in each case, and the params for it.
TO_DO = {
    1: "use a linear classifier on the codes, and fine-tune only the head (stage1.unfreeze: []) or "
    "with a low learning rate",
    2: "fine-tune the full network: stages 1 and 2 as they are",
    3: "use an SVM on activations from earlier in the network, which the probe's search includes",
    4: "fine-tune the full network; train from scratch (backbone.weights: none) only for "
    f"comparison: {PRETRAINED_WON}",
}


@dataclass(frozen=True)
class Lengths:
    """The params that set how long the later stages run: read here, checked there."""

    unfreeze: Annotated[Auto | list[str], Key("stage1.unfreeze", foreign=True)]
    first_size: Annotated[Auto | Size, Key("stage1.image_size", foreign=True)]
    first_views: Annotated[int, Key("stage1.views", foreign=True), Ge(0)]
    first_epochs: Annotated[Epochs, Key("stage1.epochs", foreign=True)]
    batch_size: Annotated[int, Key("stage1.batch_size", foreign=True), Ge(2)]
    second_size: Annotated[Auto | Size, Key("stage2.image_size", foreign=True)]
    second_epochs: Annotated[Epochs, Key("stage2.epochs", foreign=True)]
    second_batch_size: Annotated[int, Key("stage2.batch_size", foreign=True), Ge(2)]
    test_views: Annotated[int, Key("evaluate.views", foreign=True), Interval(ge=1, le=8)]


def advise(
    *,
    prepared: Path,
    features: Path,
    probe: Path,
    grid: Path,
    scores: Path,
    out: Out,
    lengths: Lengths,
    how: Augment,
    precision: Annotated[Precision, Key("precision")],
    seed: Seed,
) -> dict[str, float]:
    """Estimate, from the codes and the probe, what fine-tuning would gain.

    Writes advice.json, advice.txt and profile.csv. Returns the expected seconds of each later stage
    on this machine, for timing.json.
    """
    set_up_torch()
    torch.manual_seed(seed)
    train = read_labels(features, "train")
    facts = read_feature_facts(features)
    by_depth = profile(grid, facts["depths"])
    lines = [(depth, f"{accuracy:.6f}") for depth, accuracy in by_depth.items()]
    write_csv(out / "profile.csv", [("depth", "accuracy"), *lines])
    if facts["backbone"]["weights"] == "none":
        advice: dict[str, object] = {"case": None, "expected_gain": None}
        text = (
            "No pretrained weights (backbone.weights: none), so there is nothing to transfer: "
            f"stage 1 trains everything. For comparison: {PRETRAINED_WON}."
        )
    else:
        headless = facts["backbone"].get("headless", False)
        rows = np.unique(np.linspace(0, len(train.labels) - 1, MOST).astype(int))
        advice, text = _advice(
            list(facts["classes"]),
            transferability(
                train.labels,
                rows,
                None if headless else read_codes(features, "train", SOURCE)[rows],
                by_depth,
            ),
            json.loads(scores.read_text(encoding="utf-8"))["probe"],
        )
    write_json(out / "advice.json", {"advice": advice})
    write_text(out / "advice.txt", fill(text, 96) + "\n")
    say(f"{text.partition('. ')[0]}: {out}/advice.txt")

    packed = read_facts(prepared)
    _, images = read_splits(prepared, (), SPLITS)
    network, _ = start_network(probe, packed, lengths.first_size, "probe", resolved(precision))
    second = input_size(network.model, lengths.second_size, packed.size, STAGE_2_AT)
    pace = measure(
        network,
        what_trains(network, lengths.unfreeze),
        images[0],
        (network.image_size, second),
        lengths.batch_size,
        how,
    )
    sizes = map(len, images)
    seconds = durations(pace, lengths, how, *sizes)
    said = ", ".join(f"{stage} {s / 60:.1f} min" for stage, s in seconds.items())
    say(f"expected on this machine: {said}")
    return {f"{stage}_expected_seconds": s for stage, s in seconds.items()}


def _advice(
    classes: list[str], found: Transferability, by_cross_validation: dict[str, float]
) -> tuple[dict[str, object], str]:
    """Return the content of advice.json, and the same in words."""
    linear, winner = (
        (by_cross_validation[key] * found.images + 0.5) / (found.images + 1)  # never 0 or 1
        for key in ("linear_cv_accuracy", "cv_accuracy")
    )
    # Results on this data set itself are left out.
    known = [k for k in (*PUBLISHED, *OURS) if list(k.classes) != classes]
    expected, case = expected_gain(found.images, linear, winner, known), case_of(found)
    advice: dict[str, object] = {
        "case": case,
        "probe": winner,
        "probe_linear": linear,
        "expected_gain": asdict(expected),
        "evidence": asdict(found),
    }
    return advice, paragraph(case, found, winner, expected)


def paragraph(case: int | None, found: Transferability, winner: float, expected: Expected) -> str:
    """Return the advice in words."""
    size = "large" if found.images >= LARGE else "small"
    if case is None:
        which = (
            f"A {size} data set; the weights have no classifier, so their likeness to it is not "
        )
        which += "known"
        source, to_do = "", "Compare the probe with stages 1 and 2"
    else:
        like = "unlike" if case > 2 else "like"
        which = f"Case {case}: {size}, {like} what the weights were trained on"
        source = (
            f"The source's classifier has a mean confidence of {found.source_confidence:.2f} on "
            f"these images, and its classes explain {found.source_information:.0%} of the label "
            "entropy. "
        )
        to_do = f"For this case: {TO_DO[case]}"
    low, high = f"{100 * expected.low:+.1f}", f"{100 * expected.high:+.1f}"
    worth = (
        "it should pay"
        if expected.low > 0
        else "it should not pay"
        if expected.high < 0
        else "it may or may not pay, which evaluate will show"
    )
    return (
        f"{which}. {found.images:,} training "
        f"images in {found.classes} classes ({found.smallest_class:,} in the smallest). "
        f"Cross-validation accuracy is {found.late:.3f} on the last codes and {found.early:.3f} on "
        f"the best earlier ones. {source}{to_do}. The "
        f"expected gain of full fine-tuning over the probe's {winner:.3f} is "
        f"{100 * expected.gain:+.1f} points (80 % of cases: {low} to {high}), estimated from "
        f"{expected.sets:.0f} known data sets of similar size: {worth}. "
        "The expected run times are in models/advice/timing.json."
    )


def durations(
    pace: Throughput,
    lengths: Lengths,
    how: Augment,
    train: int,
    val: int,
    test: int,
) -> dict[str, float]:
    """Return the expected seconds of stage 1, stage 2 and evaluate, from their lengths."""
    first = epochs_of(lengths.first_epochs, train, lengths.batch_size)
    second = epochs_of(lengths.second_epochs, train, lengths.second_batch_size)
    test_views = len(views(how.flips, lengths.test_views))
    passes = (lengths.first_views or first) + head_views(how.flips, train)
    top_alone = max(pace.first - pace.trunk, 0)
    return {
        "stage1": (passes * train + val) * pace.trunk
        + first * (train * pace.top + val * top_alone),
        "stage2": second * train * pace.step
        # One before training, and those of the interpolated weights.
        + (second + 1 + len(FACTORS)) * val * pace.second,
        "evaluate": test_views * (val + test) * (pace.first + pace.second),
    }
