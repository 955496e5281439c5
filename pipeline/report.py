"""Report: write one page with the results of all stages, which can be read offline."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from pipeline.dataset.audit_summary import findings
from pipeline.final_model.classifier import Classifier, load
from pipeline.final_model.grad_cam import activation_maps, explained_blocks
from pipeline.final_model.graph import Graph
from pipeline.final_model.operating_point import POSITIVE, at_point_in_words
from pipeline.images.shards import read_splits
from pipeline.nets import checkpoint
from pipeline.nets.backbone import licence_of
from pipeline.nets.device import set_up_torch
from pipeline.pages import charts
from pipeline.pages.render import evidence_picture, percent, picture, render
from pipeline.probing.probes import read_probes
from pipeline.scoring.answers import ANSWER, read_answers
from pipeline.scoring.metrics import MEASURES
from pipeline.stage_runtime.files import Rowwise, reading, write_text
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.schema import STAGES, AllParams, Out, flat
from pipeline.statistics.reliability import calibration_error, reliability
from pipeline.statistics.verdict import TOO_FEW, measure_in_words, verdicts

TEMPLATE = Path(__file__).parent / "pages" / "report.html"
MISTAKES, UNSURE, SURE = 12, 12, 8  # pictures
SIDE = 160  # pixels of a picture
MOST_CLASSES = 20  # in a confusion matrix; with more classes, none is drawn
MOST_ROWS = 30  # of a table that are visible; the rest is collapsed
NAMES = {
    "probe_linear": "linear probe",
    "probe": "best probe",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "blend": "blend",
}
# Where each stage's timing.json lies, below models/.
TIMINGS = {name: "advice" if name == "advise" else name for name in STAGES}
Row = dict[str, str]


def report(
    *,
    prepared: Path,
    probe: Path,
    out_of_fold: Path,
    advice: Path,
    stage1: Path,
    stage2: Path,
    evaluated: Path,
    final: Path,
    out: Out,
    params: AllParams,
) -> dict[str, float]:
    """Write verdict, comparison, curves, mistakes, audit and params as one page.

    The figures and the verdict are of the test split. The pictures are of the validation split and
    of training images that cross-validation held out, because people relabel what they see.

    Raises DataError if a file of an earlier stage is missing or damaged.
    """
    set_up_torch()
    metrics = _json(evaluated / "metrics.json")
    against = _json(evaluated / "advice.json")["fine_tuning"]
    predictions = _rows(evaluated / "predictions.csv")
    per_class = _rows(evaluated / "per_class.csv")
    audit = _json(prepared / "audit.json", "prepare")
    winner, _, _ = read_probes(probe)
    classifier, (_, meta) = load(final), checkpoint.read(final)
    _, (train_images, val_images) = read_splits(prepared, (), ("train", "val"))
    histories = [_rows(folder / "history.csv", folder.name) for folder in (stage1, stage2)]
    chosen = metrics["chosen"]
    answer = ANSWER if predictions and ANSWER in predictions[0] else chosen
    backbone = classifier.network.backbone.name, classifier.network.backbone.weights
    page = render(
        TEMPLATE,
        metrics=metrics,
        names={model: name for model, name in NAMES.items() if model in metrics["val"]},
        chosen=chosen,
        winner=winner,
        verdicts=verdicts(metrics) if predictions else [],
        measure=MEASURES[params["measure"]],
        measured=_measured(metrics) if predictions else "",
        most_frequent=_most_frequent(predictions),
        images=len(predictions),
        comparison=_comparison(metrics["test"]),
        advice=_text(advice / "advice.txt", "advise"),
        against=against,
        gain=_gain(against, metrics),
        learning=_learning(*histories),
        interpolation=_interpolation(_rows(stage2 / "interpolation.csv", "stage2")),
        profile=_profile(_rows(advice / "profile.csv", "advise")),
        confusion=_confusion(_rows(evaluated / "confusion.csv"), classifier.network.classes),
        confused=_confused(predictions, answer),
        per_class=sorted(
            (row for row in per_class if row["model"] == chosen),
            key=lambda row: float(row["recall"] or 2),  # lowest first, missing last
        ),
        recall={(row["model"], row["class"]): row["recall"] for row in per_class},
        most_rows=MOST_ROWS,
        calibration=_calibration(predictions, answer),
        classifier=classifier,
        licence=licence_of(*backbone),
        sure=classifier.sure_in_words,
        **_operating_point(metrics, classifier, _rows(evaluated / "validation.csv")),
        galleries=[
            *_galleries(_rows(evaluated / "validation.csv"), val_images, classifier),
            _held_out(_rows(out_of_fold, "probe"), train_images),
        ],
        audit=audit,
        audited=findings(audit),
        leaks=_leaks(audit),
        params=list(flat(params)),
        versions=meta["versions"],
        timings=TIMINGS,
    )
    write_text(out, page)
    say(f"{out}: {len(page.encode()) / 1e6:.1f} MB, opens without internet access")
    return {}


def _json(file: Path, stage: str = "evaluate") -> dict[str, Any]:
    with reading(file, stage):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _text(file: Path, stage: str) -> str:
    with reading(file, stage):
        return file.read_text(encoding="utf-8")


def _rows(file: Path, stage: str = "evaluate") -> list[Row]:
    with reading(file, stage), file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _measured(metrics: dict[str, Any]) -> str:
    """Return what the page says of the measure, if that isn't the accuracy."""
    measured = metrics["measure"]
    return "" if measured["name"] == "accuracy" else measure_in_words(measured)


def _most_frequent(predictions: Sequence[Row]) -> float | None:
    """Return the accuracy of always predicting the most frequent class."""
    counts = Counter(row["label"] for row in predictions)
    return max(counts.values()) / len(predictions) if predictions else None


def _comparison(test: dict[str, Any]) -> Markup | None:
    """Draw all models' test accuracies with their intervals."""
    if not test:
        return None
    rows = [
        {
            "name": name,
            "value": 100 * test[model]["accuracy"],
            **_ends(test[model]["accuracy_low"], test[model]["accuracy_high"]),
        }
        for model, name in NAMES.items()
        if model in test
    ]
    said = "; ".join(f"{r['name']} {r['value']:.1f} % ({_interval(r)})" for r in rows)
    return charts.intervals(rows, "test accuracy, %", f"Test accuracy with intervals: {said}")


def _ends(low: float | None, high: float | None) -> dict[str, float]:
    """Return the ends of an interval in percent; nothing if there is no interval."""
    return {} if low is None or high is None else {"low": 100 * low, "high": 100 * high}


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:.1f} to {row['high']:.1f}" if "low" in row else TOO_FEW


def _gain(against: dict[str, Any], metrics: dict[str, Any]) -> Markup | None:
    """Draw the expected and the measured gain of fine-tuning."""
    if against["expected"] is None or against["happened"] is None:
        return None
    measured = metrics["stage2_minus_probe"]
    rows = [
        {"name": name, "value": 100 * value, **_ends(low, high)}
        for name, value, low, high in (
            ("expected", against["expected"], against["low"], against["high"]),
            ("measured", measured["accuracy"], measured["low"], measured["high"]),
        )
    ]
    said = "; ".join(f"{r['name']} {r['value']:+.1f} ({_interval(r)})" for r in rows)
    described = f"Stage 2 minus best probe, points of test accuracy: {said}"
    return charts.intervals(rows, "stage 2 minus best probe, points", described, zero=True)


def _learning(first: Sequence[Row], second: Sequence[Row]) -> list[Markup]:
    """Draw accuracy and loss by epoch; the curves of stage 2 continue those of stage 1."""
    end = int(first[-1]["epoch"])
    drawn = []
    for measure in ("accuracy", "loss"):
        rows = [
            {
                "epoch": begin + int(row["epoch"]),
                "stage": stage,
                "split": split,
                "value": float(row[column]),
            }
            for stage, begin, history in (("stage 1", 0, first), ("stage 2", end, second))
            for row in history
            for split, column in (("train", f"train_{measure}"), ("validation", f"val_{measure}"))
            if row[column]
        ]
        last = [row["value"] for row in rows if row["split"] == "validation"]
        described = (
            f"{measure} by epoch through stage 1 (epochs 0 to {end}) and stage 2: on validation "
            f"from {last[0]:.3f} to {last[-1]:.3f}"
        )
        drawn.append(charts.curves(rows, measure, end, described.capitalize()))
    return drawn


def _interpolation(curve: Sequence[Row]) -> Markup | None:
    """Draw validation accuracy by interpolation factor, if stage 2 measured it."""
    if len(curve) < 2:
        return None
    rows = [{"x": float(row["factor"]), "y": float(row["val_accuracy"])} for row in curve]
    described = f"Validation accuracy between stage 1, {rows[0]['y']:.3f}, and the "
    described += f"weights that stage 2 trained, {rows[-1]['y']:.3f}"
    return charts.steps(rows, "factor: 0 stage 1, 1 stage 2", "validation accuracy", described)


def _profile(profile: Sequence[Row]) -> Markup:
    """Draw the accuracy of the best probe at each depth."""
    rows = [{"x": row["depth"], "y": float(row["accuracy"])} for row in profile]
    said = ", ".join(f"{row['x']} {row['y']:.3f}" for row in rows)
    described = f"Best probe's accuracy by cross-validation, by depth of the codes: {said}"
    return charts.steps(
        rows, "depth of the codes", "accuracy, cross-validation", described, ordered=True
    )


def _confusion(answers: Sequence[Row], classes: Sequence[str]) -> Markup | None:
    """Draw the confusion matrix, unless it has too many classes to be readable."""
    if not answers or len(classes) > MOST_CLASSES:
        return None
    counts = Counter((row["actual"], row["predicted"]) for row in answers)
    totals = Counter(row["actual"] for row in answers)
    rows = [
        {
            "actual": actual,
            "predicted": predicted,
            "images": counts[actual, predicted],
            "share": counts[actual, predicted] / max(totals[actual], 1),
        }
        for actual in classes
        for predicted in classes
    ]
    right = sum(counts[name, name] for name in classes)
    described = f"Confusion matrix: {right} of {len(answers)} test images on its diagonal"
    return charts.confusion(rows, described)


def _confused(predictions: Sequence[Row], chosen: str, most: int = 10) -> list[tuple[Any, ...]]:
    """Return the most frequent mistakes: label, prediction and number of images."""
    pairs = Counter((r["label"], r[chosen]) for r in predictions if r["label"] != r[chosen])
    return [(*pair, n) for pair, n in sorted(pairs.items(), key=lambda p: (-p[1], p[0]))[:most]]


def _calibration(predictions: Sequence[Row], chosen: str) -> dict[str, Any] | None:
    """Draw and summarise the calibration, before and after temperature scaling."""
    if not predictions:
        return None
    right = np.array([row[chosen] == row["label"] for row in predictions])
    rows, found = [], {}
    for when, column in (("before", "uncalibrated"), ("after", "probability")):
        confidence = np.array([float(row[column]) for row in predictions])
        bins = reliability(confidence, right)
        found[when] = {
            "confidence": float(confidence.mean()),
            "error": calibration_error(bins),
        }
        rows += [
            {"when": when, "confidence": 100 * b.confidence, "accuracy": 100 * b.accuracy}
            for b in bins
        ]
    described = (
        "Accuracy by confidence: mean confidence "
        f"{percent(found['before']['confidence'])} before temperature scaling, "
        f"{percent(found['after']['confidence'])} after; accuracy {percent(float(right.mean()))}"
    )
    return {**found, "right": float(right.mean()), "chart": charts.calibration(rows, described)}


def _operating_point(
    metrics: dict[str, Any], classifier: Classifier, predictions: Sequence[Row]
) -> dict[str, Any]:
    """Return what the page says of the operating point, and its curve on validation."""
    if "operating_point" not in metrics:
        return {"at_point": None, "curve": None}
    found, point = metrics["operating_point"], classifier.decision.point
    if point is None:
        return {
            "at_point": f"{found['asked']}: not supported by the validation images",
            "curve": None,
        }
    classes = classifier.network.classes
    said = at_point_in_words(point, found, classes)
    if point.positive is None or not predictions:
        return {"at_point": said, "curve": None}
    name = classes[point.positive]
    p = np.array([float(row[POSITIVE]) for row in predictions])
    right = np.array([row["label"] == name for row in predictions])
    order = np.argsort(-p, kind="stable")
    hits, n = right[order].cumsum(), np.arange(1, len(p) + 1)
    last = np.append(p[order][1:] != p[order][:-1], True)  # a threshold includes all of its images
    rows = [
        {
            "recall": float(100 * h / max(right.sum(), 1)),
            "precision": float(100 * h / k),
            "at": bool(t >= point.threshold),
        }
        for h, k, t in zip(hits[last], n[last], p[order][last], strict=True)
    ]
    described = (
        f"Precision by recall of {name} on validation: at the operating point recall "
        f"{percent(found['val']['recall'])}, precision {percent(found['val']['precision'])}"
    )
    return {"at_point": said, "curve": charts.operating_curve(rows, described)}


def _galleries(
    predictions: Sequence[Row], images: Rowwise, classifier: Classifier
) -> list[dict[str, Any]]:
    """Choose validation images to show: mistakes, and the least and most confident answers."""
    sure, answers, right = read_answers(predictions, classifier.chosen)
    graph = Graph(classifier)

    def shown(name: str, about: str, chosen: Sequence[int], maps: bool) -> dict[str, Any]:
        rows = np.array(chosen, np.int64)
        asked = np.array([graph.inputs.classes.index(answers[i]) for i in rows], np.int64)
        found: Sequence[Any] = [None] * len(rows)
        if maps and len(rows):
            found = list(activation_maps(graph, images[rows], asked))
        cards = [
            _card(predictions[i], answers[i], images[i], classifier, evidence)
            for i, evidence in zip(rows, found, strict=True)
        ]
        return {"name": name, "about": about, "cards": cards}

    by_doubt, by_trust = np.argsort(sure, kind="stable"), np.argsort(-sure, kind="stable")
    where = (
        f"where the evidence for the answer lies (Grad-CAM at {', '.join(explained_blocks(graph))})"
    )
    return [
        shown(
            "The most confident mistakes on validation",
            "Look for wrong labels, and for parts of an image that mislead the model. The second "
            f"picture shows {where}.",
            [i for i in by_trust if not right[i]][:MISTAKES],
            maps=True,
        ),
        shown(
            "The least confident answers on validation",
            "If you label more images, choose images like these.",
            list(by_doubt[:UNSURE]),
            maps=False,
        ),
        shown(
            "The most confident right answers on validation",
            f"Some of each class. The second picture shows {where}: check that this is the object.",
            _of_each_class([i for i in by_trust if right[i]], predictions, SURE),
            maps=True,
        ),
    ]


def _held_out(predictions: Sequence[Row], images: Rowwise) -> dict[str, Any]:
    """Choose the best probe's most confident mistakes on held-out training images."""
    seen = [i for i, row in enumerate(predictions) if row["probe"]]  # an SVM may use a subset
    sure, answers, right = read_answers([predictions[i] for i in seen], "probe")
    places = [place for place in np.argsort(-sure, kind="stable") if not right[place]][:MISTAKES]
    return {
        "name": "The best probe's most confident mistakes on training images",
        "about": "Each image was answered by a probe that was fitted without it "
        "(cross-validation). Look for wrong labels.",
        "cards": [
            _card(predictions[seen[p]], answers[p], images[seen[p]], None, None) for p in places
        ],
    }


def _card(
    row: Row,
    answer: str,
    pixels: NDArray[np.uint8],
    classifier: Classifier | None,
    evidence: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Return what the page shows of an image."""
    return {
        **row,
        "answer": answer,
        "right": answer == row["label"],
        "unsure": classifier is not None
        and classifier.decision.is_sure(
            float(row["probability"]), classifier.network.classes.index(answer)
        )
        is False,
        "picture": picture(pixels, SIDE),
        "map": None if evidence is None else evidence_picture(pixels, evidence, SIDE),
    }


def _leaks(audit: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Return the duplicates that lie in several splits or have several labels, by kind."""
    return {
        f"{kind.replace('_', ' ')} {where.replace('_', ' ')}": audit[kind][where]
        for kind in ("equal_files", "near_duplicates")
        for where in ("across_splits", "across_labels")
        if audit[kind][where]
    }


def _of_each_class(ranked: Sequence[int], predictions: Sequence[Row], most: int) -> list[int]:
    """Return the first image of each class, then the second, and so on, at most `most`."""
    seen: Counter[str] = Counter()
    turns = []
    for i in ranked:
        label = predictions[i]["label"]
        turns.append((seen[label], label, int(i)))
        seen[label] += 1
    return [i for _, _, i in sorted(turns)[:most]]
