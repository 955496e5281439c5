"""Evaluate: score all models and their blend on the test split, once; write the final model."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval

from pipeline.final_model.candidates import BLEND, SINGLE, Candidate, candidates_of, choose, scored
from pipeline.final_model.classifier import Classifier, Member
from pipeline.final_model.operating_point import (
    Decision,
    OperatingPoint,
    asked_for,
    at_point,
    at_point_in_words,
    fitted,
)
from pipeline.images.rows import Rows
from pipeline.images.shards import Images, read_facts, read_splits
from pipeline.nets.backbone import rebuild
from pipeline.nets.checkpoint import versions
from pipeline.nets.device import set_up_torch
from pipeline.nets.network import Network, facts_of, from_facts
from pipeline.probing.probes import read_probes
from pipeline.scoring.answers import Sureness, answer_lines
from pipeline.scoring.metrics import Floats, by_image, undefined
from pipeline.stage_runtime.errors import ParamError
from pipeline.stage_runtime.files import write_csv, write_json
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Key, Measure, Out
from pipeline.statistics.reliability import (
    sure_by_answer,
    sure_by_answer_in_words,
    sure_in_words,
    sure_threshold,
)
from pipeline.statistics.significance import (
    accuracy_interval,
    difference,
    measure_difference,
    measure_interval,
)
from pipeline.statistics.verdict import (
    confusion,
    interval_in_words,
    measure_in_words,
    model_scores,
    verdicts,
)

TIMED = 24  # images


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
    candidates: list[Literal["probe", "stage1", "stage2", "blend"]],
    views: Annotated[int, Interval(ge=1, le=8)],
    tie: Annotated[float, Interval(ge=0, le=5)],
    operating_point: str,
    sure_accuracy: Annotated[float, Interval(ge=0, le=1)],
    measure: Annotated[Measure, Key("measure")],
    resume: Resume,
) -> dict[str, float]:
    """Score the models of all stages and their blend on test, and write the final model.

    The blend is the weighted mean of the other candidates' calibrated probabilities. The final
    model is the first candidate of blend, stage 2, stage 1 and probe, unless another is better on
    validation, by the measure, by more than `tie` standard errors. Weights, temperatures, the
    operating point and the thresholds for "not sure" are fitted on the validation split; what is
    said of that split is of fits to other groups of its images.

    Writes metrics.json, advice.json (the expected and the measured gain of stage 2),
    confusion.csv, per_class.csv, predictions.csv and validation.csv (the predictions on the
    validation split) into `out`, and model.safetensors into `final`. Returns how many images a
    second the final model classifies.
    """
    set_up_torch()
    _refuse_no_models(candidates)
    (val, test), images = read_splits(prepared, ("val", "test"))
    classes = read_facts(prepared).classes
    asked = asked_for(operating_point, classes)
    *_, of_codes = read_probes(probe)
    models = scored(images, features, probe, (stage1, stage2), views, classes, resume)
    truth = val.labels, val.groups
    compared = candidates_of(models, candidates, *truth)
    if doubt := undefined(measure, val.labels, classes, "validation"):
        say(doubt)
    chosen = choose(compared, candidates, *truth, tie, measure)
    decision, sure, unsupported = _decided(asked, chosen, val, classes, sure_accuracy)
    classifier = Classifier(
        _members(chosen, of_codes), chosen.mixture.temperature, decision, chosen.name, sure
    )
    val_accuracy = {n: float((c.val.argmax(1) == val.labels).mean()) for n, c in compared.items()}
    facts = {"val_accuracy": val_accuracy[chosen.name], "versions": versions(), **chosen.training}
    classifier.save(final / "model.safetensors", **facts)

    metrics: dict[str, Any] = {"test": {}, "chosen": chosen.name, "val": val_accuracy}
    if len(test.labels):
        metrics = {**metrics, **_compared(compared, chosen.name, test)}
    if len(test.labels) or measure != "accuracy":
        metrics["measure"] = _measured(measure, compared, chosen.name, val, test)
    if asked:
        metrics["operating_point"] = _at_point(asked, decision.point, chosen, val, test)
    _write_tables(out, compared, val, test, classes, chosen, decision)
    write_json(out / "metrics.json", metrics)
    for line in _verdict(metrics, len(test.labels)):
        say(line)
    if asked and decision.point:
        told = at_point_in_words(decision.point, metrics["operating_point"], classes)
        say(f"operating point: {told}")
    elif asked:
        say(f"operating point: {unsupported}")
    say(sure)
    against = _against(advice, metrics)
    write_json(out / "advice.json", {"fine_tuning": against})
    if against["held"] is not None:
        say(
            f"expected gain {100 * against['low']:+.1f} to {100 * against['high']:+.1f} points: "
            f"the measured gain is {'inside' if against['held'] else 'outside'} this interval"
        )
    return {"final_images_per_second": _speed(classifier, images[0])}


def _refuse_no_models(candidates: Sequence[str]) -> None:
    """Raise ParamError if there is nothing to choose from, or to blend."""
    single = [name for name in SINGLE if name in candidates]
    if not single:
        raise ParamError(f"evaluate.candidates: name one or more of {', '.join(SINGLE)}")
    if BLEND in candidates and len(single) < 2:
        raise ParamError(
            f"evaluate.candidates: a blend of {single[0]} alone; name another model, or leave out "
            f"{BLEND}"
        )


def _members(chosen: Candidate, of_codes: dict[str, Any]) -> list[Member]:
    """Return what the final classifier is made of; models without weight are left out."""
    how = chosen.mixture
    return [
        Member(
            m.name,
            m.network or _trunk(of_codes),
            m.probe,
            of_codes["pooling"],
            m.tta,
            temperature,
            weight,
        )
        for m, temperature, weight in zip(
            chosen.members, how.temperatures, how.weights, strict=True
        )
        if weight
    ]


def _decided(
    asked: OperatingPoint | None,
    chosen: Candidate,
    val: Rows,
    classes: Sequence[str],
    sure_accuracy: float,
) -> tuple[Decision, str, str]:
    """Fit how the final model answers, on validation.

    Returns it, when it says "not sure" in words, and why there is no operating point if one was
    asked for.
    """
    p = np.exp(chosen.val)
    point, unsupported = fitted(asked, p, val.labels) if asked else (None, "")
    truth = val.labels, val.groups
    if point is None:
        sure = sure_threshold(p, *truth, sure_accuracy)
        words = sure_in_words(sure.above, sure_accuracy, sure.images)
        return Decision([sure.above] * len(classes)), words, unsupported
    by_answer = sure_by_answer(p, point.answers(p), *truth, sure_accuracy)
    words = sure_by_answer_in_words(by_answer, classes, sure_accuracy)
    return Decision([sure.above for sure in by_answer], point), words, ""


def _at_point(
    asked: OperatingPoint, point: OperatingPoint | None, chosen: Candidate, val: Rows, test: Rows
) -> dict[str, Any]:
    """Return the metrics of the operating point on both splits; nothing if it isn't supported."""
    found: dict[str, Any] = {"asked": asked.asked, "threshold": point and point.threshold}
    for split, rows, log_p in (("val", val, chosen.val), ("test", test, chosen.test)):
        if point and len(rows.labels):
            found[split] = at_point(point, np.exp(log_p), rows.labels, rows.groups)
    return found


def _trunk(meta: dict[str, Any]) -> Network:
    """Build the network that computed the probes' codes."""
    facts = facts_of(meta)
    return from_facts(rebuild(facts["backbone"]).eval(), facts)


def _speed(classifier: Classifier, images: Images) -> float:
    """Measure how many images a second the final model classifies, and say what each part takes."""
    some = images[np.arange(min(TIMED, len(images)))]
    taken = []
    for member in classifier.members:
        member.scores(some[:1])
        start = time.perf_counter()
        member.scores(some)
        taken.append((time.perf_counter() - start) / len(some))
    each = zip(classifier.members, taken, strict=True)
    parts = " + ".join(f"{member.name} {1000 * t:.0f}" for member, t in each)
    say(f"the final model takes {1000 * sum(taken):.0f} ms an image: {parts}")
    return 1 / sum(taken)


def _compared(compared: dict[str, Candidate], chosen: str, test: Rows) -> dict[str, Any]:
    """Return each model's test metrics with intervals, and gains over the probe.

    Intervals are null if there are too few groups of test images.
    """
    right = {name: c.test.argmax(1) == test.labels for name, c in compared.items()}
    table = {}
    for name, candidate in compared.items():
        low, high = accuracy_interval(right[name], test.groups) or (None, None)
        found = model_scores(candidate.test, test.labels, test.weights)
        table[name] = {
            "accuracy": found.pop("accuracy"),
            "accuracy_low": low,
            "accuracy_high": high,
            **found,
        }
    gains = {
        f"{name}_minus_probe": difference(right[model], right["probe"], test.groups)
        for name, model in (("stage2", "stage2"), ("chosen", chosen))
    }
    return {"test": table, **gains}


def _measured(
    measure: Measure, compared: dict[str, Candidate], chosen: str, val: Rows, test: Rows
) -> dict[str, Any]:
    """Return the final model's measure on test with its interval, and on validation.

    If that isn't the accuracy, which the other keys tell, also that of each model on test, and the
    gains over the probe. What isn't defined is null.
    """
    sign = -1 if measure == "log_loss" else 1

    def mean(values: Floats | None) -> float | None:
        return None if values is None or not len(values) else sign * float(values.mean())

    on_val = by_image(measure, compared[chosen].val, val.labels)
    found: dict[str, Any] = {"name": measure, "value": None, "low": None, "high": None}
    found["val"] = mean(on_val)
    if not len(test.labels):
        return found
    values = {name: by_image(measure, c.test, test.labels) for name, c in compared.items()}
    of_chosen, of_probe = values[chosen], values["probe"]
    found["value"] = mean(of_chosen)
    if of_chosen is None or of_probe is None:
        return found
    truth = test.labels, test.groups
    found["low"], found["high"] = measure_interval(measure, of_chosen, *truth) or (None, None)
    if measure == "accuracy":
        return found
    found["test"] = {name: mean(v) for name, v in values.items()}
    for name, model in (("stage2", "stage2"), ("chosen", chosen)):
        ours = values[model]
        assert ours is not None
        found[f"{name}_minus_probe"] = measure_difference(measure, ours, of_probe, *truth)
    return found


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
    compared: dict[str, Candidate],
    val: Rows,
    test: Rows,
    classes: Sequence[str],
    chosen: Candidate,
    decision: Decision,
) -> None:
    """Write the tables for the report and the plots: confusion, per class, predictions."""
    answers = [("actual", "predicted")]
    answers += [
        (classes[label], classes[answer])
        for label, answer in zip(test.labels, decision.answers(np.exp(chosen.test)), strict=True)
    ]
    write_csv(out / "confusion.csv", answers)
    lines: list[tuple[Any, ...]] = [("model", "class", "images", "recall", "precision")]
    for model, candidate in compared.items() if len(test.labels) else ():
        counts = confusion(candidate.test, test.labels)
        for i, name in enumerate(classes):
            actual, answered = counts[i].sum(), counts[:, i].sum()
            recall = f"{counts[i, i] / actual:.6f}" if actual else ""
            precision = f"{counts[i, i] / answered:.6f}" if answered else ""
            lines.append((model, name, actual, recall, precision))
    write_csv(out / "per_class.csv", lines)
    splits: tuple[tuple[str, Literal["val", "test"], Rows], ...] = (
        ("predictions.csv", "test", test),
        ("validation.csv", "val", val),
    )
    for file, split, rows in splits:
        scores = {name: getattr(candidate, split) for name, candidate in compared.items()}
        log_p = scores[chosen.name]
        given = decision.answers(np.exp(log_p))
        sure = Sureness(given, log_p, chosen.uncalibrated(split))
        more = decision.point.columns(log_p, given, classes) if decision.point else None
        write_csv(out / file, answer_lines(rows, scores, chosen.name, sure, classes, more))


def _verdict(metrics: dict[str, Any], n: int) -> list[str]:
    """Return the results as lines of text."""
    chosen = metrics["chosen"]
    if not metrics["test"]:
        return [f"no labelled test split, so no verdict; final model: {chosen}"]
    lines = [f"{'':<14} val acc  test acc (95 % interval)   balanced  AUROC   on {n} test images"]
    for name, m in metrics["test"].items():
        auroc = "-" if m["auroc"] is None else f"{m['auroc']:.3f}"
        lines.append(
            f"{name:<14} {metrics['val'][name]:.4f}   {m['accuracy']:.4f}   "
            f"({interval_in_words(m['accuracy_low'], m['accuracy_high'])})   "
            f"{m['balanced_accuracy']:.4f}    {auroc}"
        )
    if metrics["measure"]["name"] != "accuracy":
        lines.append(measure_in_words(metrics["measure"]))
    return [*lines, *verdicts(metrics), f"final model: {chosen}"]
