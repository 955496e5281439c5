"""Advise: which of the four cases this data is, what fine-tuning may bring, and what it costs.

The four are those of the CS231n notes on transfer learning: small or large, like the data that the
weights were made for or not.
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
from pipeline.nets.device import set_up_torch
from pipeline.nets.fuse import Precision, resolved
from pipeline.probing.codes import SOURCE, read_codes, read_feature_facts, read_labels
from pipeline.stage_runtime.files import write_csv, write_json, write_text
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import Key, Out, Seed
from pipeline.training.start import start_network, what_trains

Size = Interval(ge=16, le=2048)
MOST = 10_000  # images that the source's answers are looked at for, evenly spaced

WON = sum(k.fine_tuned > (k.scratch or 0) for k in PUBLISHED)
PRETRAINED_WON = f"pretrained ones won on {WON} of {len(PUBLISHED)} published sets"

# What the notes say of each case, and the params that do it.
TO_DO = {
    1: "a linear classifier on the codes; fine-tune the head alone (stage1.unfreeze: []) or gently",
    2: "fine-tune through the full network: stages 1 and 2 as they are",
    3: "an SVM on activations from earlier in the network, which is what the probe looks for",
    4: "fine-tune through the full network; from scratch (backbone.weights: none) is for "
    f"comparison: {PRETRAINED_WON}",
}


@dataclass(frozen=True)
class Lengths:
    """How long the later stages are set to be: read here, checked there."""

    unfreeze: Annotated[list[str], Key("stage1.unfreeze", foreign=True)]
    first_size: Annotated[int, Key("stage1.image_size", foreign=True), Size]
    first_views: Annotated[int, Key("stage1.views", foreign=True), Ge(0)]
    first_epochs: Annotated[int, Key("stage1.epochs", foreign=True), Ge(1)]
    batch_size: Annotated[int, Key("stage1.batch_size", foreign=True), Ge(2)]
    second_size: Annotated[int, Key("stage2.image_size", foreign=True), Size]
    second_epochs: Annotated[int, Key("stage2.epochs", foreign=True), Ge(1)]
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
    """Say what the codes and the probe tell about fine-tuning, before any is done.

    Writes advice.json, advice.txt and profile.csv. What the stages to come are expected to take on
    this machine is returned, in seconds, for timing.json.
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
            "No pretrained weights (backbone.weights: none), so nothing to transfer: stage 1 "
            f"trains everything. Compare with weights: {PRETRAINED_WON}."
        )
    else:
        rows = np.unique(np.linspace(0, len(train.labels) - 1, MOST).astype(int))
        advice, text = _advice(
            list(facts["classes"]),
            transferability(
                train.labels, rows, read_codes(features, "train", SOURCE)[rows], by_depth
            ),
            json.loads(scores.read_text(encoding="utf-8"))["probe"],
        )
    write_json(out / "advice.json", {"advice": advice})
    write_text(out / "advice.txt", fill(text, 96) + "\n")
    say(f"{text.partition('. ')[0]}: {out}/advice.txt")

    packed = read_facts(prepared)
    _, images = read_splits(prepared, (), SPLITS)
    network, _ = start_network(probe, packed, lengths.first_size, "probe", resolved(precision))
    pace = measure(
        network,
        what_trains(network, lengths.unfreeze),
        images[0],
        (lengths.first_size, lengths.second_size),
        lengths.batch_size,
        how,
    )
    sizes = map(len, images)
    seconds = durations(pace, lengths, len(views(how.flips, lengths.test_views)), *sizes)
    said = ", ".join(f"{stage} {s / 60:.1f} min" for stage, s in seconds.items())
    say(f"on this machine, as set: {said}")
    return {f"{stage}_expected_seconds": s for stage, s in seconds.items()}


def _advice(
    classes: list[str], found: Transferability, by_cross_validation: dict[str, float]
) -> tuple[dict[str, object], str]:
    """Give what advice.json holds, and the same in words."""
    linear, winner = (
        (by_cross_validation[key] * found.images + 0.5) / (found.images + 1)  # never 0 or 1
        for key in ("linear_cv_accuracy", "cv_accuracy")
    )
    # A set is no evidence for itself.
    known = [k for k in (*PUBLISHED, *OURS) if list(k.classes) != classes]
    expected, case = expected_gain(found.images, linear, winner, known), case_of(found)
    advice = {
        "case": case,
        "probe": winner,
        "probe_linear": linear,
        "expected_gain": asdict(expected),
        "evidence": asdict(found),
    }
    return advice, paragraph(case, found, winner, expected)


def paragraph(case: int, found: Transferability, winner: float, expected: Expected) -> str:
    """Say it in words."""
    size = "large" if found.images >= LARGE else "small"
    like = "unlike" if case > 2 else "like"
    low, high = f"{100 * expected.low:+.1f}", f"{100 * expected.high:+.1f}"
    worth = (
        "it should pay"
        if expected.low > 0
        else "it should not pay"
        if expected.high < 0
        else "it may pay or not, which evaluate will tell"
    )
    return (
        f"Case {case}: {size}, {like} what the weights were made for. {found.images:,} training "
        f"images in {found.classes} classes ({found.smallest_class:,} of the rarest); by "
        f"cross-validation the last codes get {found.late:.3f} right, the best earlier ones "
        f"{found.early:.3f}; the source's classifier is sure of these images to "
        f"{found.source_confidence:.2f}, and its classes tell {found.source_information:.0%} of "
        f"what the labels say. For this case: {TO_DO[case]}. Full fine-tuning is expected to bring "
        f"{100 * expected.gain:+.1f} points over the probe's {winner:.3f} (80 % of cases: {low} to "
        f"{high}), going by {expected.sets:.0f} known sets of like size: {worth}. "
        "How long that takes here stands in models/advice/timing.json."
    )


def durations(
    pace: Throughput, lengths: Lengths, test_views: int, train: int, val: int, test: int
) -> dict[str, float]:
    """Tell how many seconds stage 1, stage 2 and evaluate will compute, from their lengths."""
    passes = lengths.first_views or lengths.first_epochs
    top_alone = max(pace.first - pace.trunk, 0)
    return {
        "stage1": (passes * train + val) * pace.trunk
        + lengths.first_epochs * (train * pace.top + val * top_alone),
        # Eleven more validations: between stage 1's weights and stage 2's.
        "stage2": lengths.second_epochs * train * pace.step
        + (lengths.second_epochs + 12) * val * pace.second,
        "evaluate": test_views * (val + test) * (pace.first + pace.second),
    }
