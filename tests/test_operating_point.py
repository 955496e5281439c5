import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import paths, read_params, run
from sklearn.metrics import precision_score, recall_score
from test_report import Page
from test_stages import copied, where

from pipeline.commands.predict import predict
from pipeline.final_model import classifier
from pipeline.final_model import onnx as portable
from pipeline.final_model.graph import Graph
from pipeline.final_model.operating_point import Decision, OperatingPoint, asked_for, fitted
from pipeline.images.shards import read_images, read_rows
from pipeline.stage_runtime.errors import ParamError
from pipeline.statistics.reliability import sure_by_answer, sure_from

CLASSES = ["fine", "cracked cell", "dirty"]


def drawn(n, seed, classes=3):
    """Calibrated probabilities (N, C) and labels (N,)."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.full(classes, 0.5), n)
    return p, (p.cumsum(1) > random.random((n, 1))).argmax(1)


@pytest.mark.parametrize(("n", "level"), [(40, 0.8), (100, 0.8), (100, 0.95)])
def test_a_recall_holds_in_the_mean_over_draws_of_validation_images(n, level):
    asked = asked_for(f"recall cracked cell {level}", CLASSES)
    held = []
    for seed in range(400):
        p, labels = drawn(n, seed)
        point, _ = fitted(asked, p, labels)
        others, truth = drawn(400, 1000 + seed)
        if point:  # else too few images of the class
            answers = point.answers(others)
            held.append(recall_score(truth, answers, labels=[1], average="macro"))
    assert len(held) > 100
    assert level - 0.01 < np.mean(held) < level + 0.8 / (n / 3)


def test_a_precision_is_that_of_the_lowest_threshold_by_hand():
    asked = asked_for("precision fine 0.7", CLASSES)
    p = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3])
    labels = np.array([0, 0, 0, 0, 1, 0, 0, 0, 1, 1])
    # Right of those above, one wrong added: 1/2 2/3 3/4 4/5 4/6 5/7 6/8 7/9 7/10 7/11.
    probabilities = np.stack([p, 1 - p, np.zeros(10)], 1)
    point, _ = fitted(asked, probabilities, labels)
    assert point.threshold == 0.4
    answers = point.answers(probabilities)
    assert precision_score(labels == 0, answers == 0) == pytest.approx(7 / 9)
    # Images of the same probability are above it together.
    same = np.stack([np.full(10, 0.6), np.full(10, 0.4), np.zeros(10)], 1)
    assert fitted(asked, same, labels)[0] is None


@pytest.mark.parametrize(
    ("asked", "least"),
    [("recall fine 0.95", 19), ("recall fine 0.9", 9), ("precision fine 0.9", 9)],
)
def test_too_few_images_of_the_class_are_said_with_how_many_it_takes(asked, least):
    for n in (least - 1, least):
        p = np.tile([0.9, 0.1, 0.0], (n, 1))
        point, why = fitted(asked_for(asked, CLASSES), p, np.zeros(n, int))
        assert (point is None) == (n < least)
        said = f"{asked}: not supported by the {n} validation images of the class (it takes {least}"
        assert why.startswith(said) == (n < least)


def test_costs_give_the_answer_of_the_lowest_expected_cost():
    point = asked_for("cost cracked cell>fine=10, dirty > fine = 0.5", CLASSES)
    assert point.costs == [[0, 1, 1], [10, 0, 1], [0.5, 1, 0]]
    p, labels = drawn(5000, 0)
    answers = point.answers(p)
    expected = [
        min(range(3), key=lambda k: sum(q[j] * point.costs[j][k] for j in range(3))) for q in p
    ]
    assert answers.tolist() == expected
    costs = np.array(point.costs)
    assert costs[labels, answers].mean() < costs[labels, p.argmax(1)].mean()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("recall cracked cel 0.9", "no class is called 'cracked cel'; did you mean cracked cell"),
        ("recall fine", "expected recall CLASS 0.95, precision CLASS 0.9"),
        ("recall fine 95", "expected a number between 0 and 1, not '95'"),
        ("recall fine nan", "expected a number between 0 and 1, not 'nan'"),
        ("accuracy fine 0.9", "expected recall CLASS"),
        ("cost fine>dirty", "'fine>dirty' is no cost; expected ACTUAL>ANSWER=10"),
        ("cost fine>dirt=2", "no class is called 'dirt'"),
        ("cost fine>dirty=-1", "is no cost"),
    ],
)
def test_a_wrong_operating_point_is_refused_in_a_line(asked, said):
    with pytest.raises(ParamError, match=said.replace("(", r"\(")) as refused:
        asked_for(asked, CLASSES)
    assert "\n" not in str(refused.value)
    assert asked_for("none", CLASSES) is None


def test_each_answer_has_its_own_bound():
    p, labels = drawn(600, 3)
    groups = np.arange(600)
    point = OperatingPoint("recall", "", positive=1, level=0.9, threshold=0.2)
    answers = point.answers(p)
    found = sure_by_answer(p, answers, labels, groups, 0.8)
    for k, one in enumerate(found):
        given = answers == k
        assert one == sure_from(p[given, k], labels[given] == k, groups[given], 0.8)
        assert one.above is not None
    limits = [one.above for one in found]
    assert len(set(limits)) == 3
    decision = Decision([*limits[:2], None], point)
    assert decision.is_sure(limits[0], 0) is True
    assert decision.is_sure(limits[0] - 1e-6, 0) is False
    assert decision.is_sure(1.0, 2) is None


@pytest.fixture(scope="module")
def at_recall(finished, tmp_path_factory):
    """A run whose final model is to find 70 % of class 1."""
    folder = copied(finished, tmp_path_factory.mktemp("at"), "prepared", "models", "features")
    run(
        folder, read_params(evaluate={"operating_point": "recall class1 0.7"}), "evaluate", "report"
    )
    return folder


def test_the_final_model_answers_at_the_operating_point_everywhere(finished, at_recall, tmp_path):
    final = classifier.load(where(at_recall)["final"] / "model.safetensors")
    point = final.decision.point
    assert (point.positive, point.level) == (1, 0.7)
    # Between the two most likely ones, so that some images of either answer are on each side.
    at = paths(finished)["prepare"]["out"]
    images, rows = read_images(at, "test"), read_rows(at, "test")
    p = final.probabilities(images)
    threshold = float(np.sort(p[:, 1])[-2:].mean())
    final = replace(
        final, decision=replace(final.decision, point=replace(point, threshold=threshold))
    )
    expected = np.where(p[:, 1] >= threshold, 1, 0)
    assert (expected != p.argmax(1)).any()
    files = [finished / "photos" / path for path in rows.paths]
    names = final.network.classes
    assert [a.labels[0] for a in predict(final, files)] == [names[i] for i in expected]
    portable.write(final, Graph(final), tmp_path / "m.onnx")
    read = portable.Portable(tmp_path / "m.onnx")
    assert [a.labels[0] for a in predict(read, files)] == [names[i] for i in expected]
    found, answers = read.session.run(None, {"pixels": np.array(images)})
    assert found == pytest.approx(p, abs=1e-4)
    assert answers.tolist() == expected.tolist()
    costs = OperatingPoint("cost", "", costs=[[0.0, 1.0], [50.0, 0.0]])
    graph = Graph(replace(final, decision=Decision([None, None], costs)))
    with torch.no_grad():
        assert graph(torch.from_numpy(np.array(images)))[1].tolist() == costs.answers(p).tolist()


def test_its_metrics_and_tables_are_those_of_its_answers(at_recall):
    metrics = json.loads((where(at_recall)["out"] / "metrics.json").read_text())
    found = metrics["operating_point"]
    assert found["asked"] == "recall class1 0.7"
    with (where(at_recall)["out"] / "predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    truth = [row["label"] == "class1" for row in rows]
    given = [row["answer"] == "class1" for row in rows]
    assert given == [float(row["positive"]) >= found["threshold"] - 1e-6 for row in rows]
    assert found["test"]["recall"] == pytest.approx(recall_score(truth, given))
    assert found["test"]["precision"] == pytest.approx(precision_score(truth, given))
    with (where(at_recall)["out"] / "confusion.csv").open(newline="") as lines:
        assert [r["predicted"] for r in csv.DictReader(lines)] == [row["answer"] for row in rows]


def test_the_page_shows_the_operating_point_and_its_curve(at_recall):
    page = Page((paths(at_recall)["report"]["out"]).read_text())
    assert "class1 if its probability is at least" in page.words
    assert "(recall class1 0.7)" in page.words
    curves = [str(a["aria-label"]) for a in page.all("svg")]
    assert any(curve.startswith("Precision by recall of class1") for curve in curves)


def test_a_level_that_validation_cannot_support_is_said_and_not_used(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "prepared", "models", "features")
    params = read_params(evaluate={"operating_point": "recall class1 0.99"})
    run(folder, params, "evaluate", "report")
    assert (
        "operating point: recall class1 0.99: not supported by the 3 vali"
        in capsys.readouterr().out
    )
    assert classifier.load(where(folder)["final"] / "model.safetensors").decision.point is None
    metrics = json.loads((where(folder)["out"] / "metrics.json").read_text())
    assert metrics["operating_point"] == {"asked": "recall class1 0.99", "threshold": None}
    page = Page((paths(folder)["report"]["out"]).read_text())
    assert "recall class1 0.99: not supported by the validation images" in page.words
