"""Evaluate: score all models on the test split, once; choose and write the final model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from scipy.special import softmax

from pipeline.final_model.candidates import Model, scored
from pipeline.final_model.classifier import Classifier
from pipeline.images.rows import Rows
from pipeline.images.shards import read_facts, read_splits
from pipeline.nets.backbone import rebuild
from pipeline.nets.checkpoint import versions
from pipeline.nets.device import set_up_torch
from pipeline.nets.network import Network, facts_of, from_facts
from pipeline.probing.probes import read_probes
from pipeline.scoring.answers import answer_lines
from pipeline.scoring.metrics import fit_temperature
from pipeline.stage_runtime.files import write_csv, write_json
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Out
from pipeline.statistics.reliability import sure_in_words, sure_threshold
from pipeline.statistics.significance import accuracy_interval, difference
from pipeline.statistics.verdict import (
    confusion,
    fine_tuning_verdict,
    interval_in_words,
    model_scores,
    simplest_of_the_best,
)

# From simple to costly: of the models that tie, the first one is the final model.
CANDIDATES = ("probe", "stage1", "stage2")


def evaluate(
    *,
    prepared: Path,
    features: Path,
    probe: Path,
    advice: Path,
    stage1: Path,
    stage2: Path,
    out: Out,
    final: Out,
    views: Annotated[int, Interval(ge=1, le=8)],
    tie: Annotated[float, Interval(ge=0, le=5)],
    sure_accuracy: Annotated[float, Interval(ge=0, le=1)],
    resume: Resume,
) -> dict[str, float]:
    """Score probe, linear probe, stage 1 and stage 2 on test, and write the final model.

    The final model is chosen by validation accuracy. Two models tie if their accuracies differ by
    at most `tie` standard errors of the difference; the simpler one is then chosen. Its temperature
    and its threshold for "not sure" are fitted on the validation split.

    Writes metrics.json, advice.json (the expected and the measured gain of stage 2),
    confusion.csv, per_class.csv, predictions.csv and validation.csv (the predictions on the
    validation split) into `out`, and model.safetensors into `final`.
    """
    set_up_torch()
    (val, test), images = read_splits(prepared, ("val", "test"))
    classes = read_facts(prepared).classes
    *_, of_codes = read_probes(probe)
    models = scored(images, features, probe, (stage1, stage2), views, classes, resume)
    right = {m.name: m.val.argmax(1) == val.labels for m in models}
    val_accuracy = {name: float(r.mean()) for name, r in right.items()}
    place = simplest_of_the_best([right[name] for name in CANDIDATES], val.groups, tie)
    (chosen,) = (m for m in models if m.name == CANDIDATES[place])
    temperature = fit_temperature(chosen.val, val.labels)
    probabilities = softmax(chosen.val / temperature, axis=1)
    sure = sure_threshold(probabilities, val.labels, val.groups, sure_accuracy)
    classifier = Classifier(
        chosen.network or _trunk(of_codes),
        chosen.probe,
        of_codes["pooling"],
        chosen.tta,
        temperature,
        sure.above,
        chosen.name,
        sure_accuracy,
        sure.images,
    )
    told = {"val_accuracy": val_accuracy[chosen.name], "versions": versions(), **chosen.training}
    classifier.save(final / "model.safetensors", **told)

    metrics: dict[str, Any] = {"test": {}, "chosen": chosen.name, "val": val_accuracy}
    if len(test.labels):
        metrics = {**metrics, **_compared(models, test)}
    _write_tables(out, models, val, test, classes, temperature, chosen)
    write_json(out / "metrics.json", metrics)
    for line in _verdict(metrics, len(test.labels)):
        say(line)
    say(sure_in_words(sure.above, sure_accuracy, sure.images))
    against = _against(advice, metrics)
    write_json(out / "advice.json", {"fine_tuning": against})
    if against["held"] is not None:
        say(
            f"expected gain {100 * against['low']:+.1f} to {100 * against['high']:+.1f} points: "
            f"the measured gain is {'inside' if against['held'] else 'outside'} this interval"
        )
    return {}


def _trunk(meta: dict[str, Any]) -> Network:
    """Build the network that computed the probes' codes."""
    facts = facts_of(meta)
    return from_facts(rebuild(facts["backbone"]).eval(), facts)


def _compared(models: Sequence[Model], test: Rows) -> dict[str, Any]:
    """Return each model's test metrics with intervals, and the gain of stage 2 over the probe.

    Intervals are null if there are too few groups of test images.
    """
    right = {m.name: m.test.argmax(1) == test.labels for m in models}
    table = {}
    for m in models:
        low, high = accuracy_interval(right[m.name], test.groups) or (None, None)
        found = model_scores(m.test, test.labels, test.weights)
        table[m.name] = {
            "accuracy": found.pop("accuracy"),
            "accuracy_low": low,
            "accuracy_high": high,
            **found,
        }
    against = difference(right["stage2"], right["probe"], test.groups)
    return {"test": table, "stage2_minus_probe": against}


def _against(advice: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the expected gain of fine-tuning and the measured gain on the test split."""
    expected = json.loads(advice.read_text(encoding="utf-8"))["advice"]["expected_gain"]
    happened = metrics["stage2_minus_probe"]["accuracy"] if metrics["test"] else None
    if not expected:
        return {"expected": None, "low": None, "high": None, "happened": happened, "held": None}
    low, high = expected["low"], expected["high"]
    held = None if happened is None else low <= happened <= high
    return {
        "expected": expected["gain"],
        "low": low,
        "high": high,
        "happened": happened,
        "held": held,
    }


def _write_tables(
    out: Path,
    models: Sequence[Model],
    val: Rows,
    test: Rows,
    classes: Sequence[str],
    temperature: float,
    chosen: Model,
) -> None:
    """Write the tables for the report and the plots: confusion, per class, predictions."""
    answers = [("actual", "predicted")]
    p = softmax(chosen.test / temperature, axis=1)
    answers += [
        (classes[label], classes[answer])
        for label, answer in zip(test.labels, p.argmax(1), strict=True)
    ]
    write_csv(out / "confusion.csv", answers)
    lines: list[tuple[Any, ...]] = [("model", "class", "images", "recall", "precision")]
    for m in models if len(test.labels) else []:
        counts = confusion(m.test, test.labels)
        for i, name in enumerate(classes):
            actual, answered = counts[i].sum(), counts[:, i].sum()
            recall = f"{counts[i, i] / actual:.6f}" if actual else ""
            precision = f"{counts[i, i] / answered:.6f}" if answered else ""
            lines.append((m.name, name, actual, recall, precision))
    write_csv(out / "per_class.csv", lines)
    for file, rows, scores in (
        ("predictions.csv", test, {m.name: m.test for m in models}),
        ("validation.csv", val, {m.name: m.val for m in models}),
    ):
        write_csv(out / file, answer_lines(rows, scores, chosen.name, temperature, classes))


def _verdict(metrics: dict[str, Any], n: int) -> list[str]:
    """Return the results as lines of text."""
    if not metrics["test"]:
        return [f"no labelled test split, so no verdict; chosen by validation: {metrics['chosen']}"]
    lines = [f"{'':<14} val acc  test acc (95 % interval)   balanced  AUROC   on {n} test images"]
    for name, m in metrics["test"].items():
        auroc = "-" if m["auroc"] is None else f"{m['auroc']:.3f}"
        lines.append(
            f"{name:<14} {metrics['val'][name]:.4f}   {m['accuracy']:.4f}   "
            f"({interval_in_words(m['accuracy_low'], m['accuracy_high'])})   "
            f"{m['balanced_accuracy']:.4f}    {auroc}"
        )
    told = fine_tuning_verdict(metrics["stage2_minus_probe"])
    return [*lines, told, f"chosen by validation: {metrics['chosen']}"]
