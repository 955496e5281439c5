"""The measure: its values are scikit-learn's, its intervals hold, and it decides."""

import csv
import json

import numpy as np
import pytest
from conftest import paths, read_params, run
from scipy.special import log_softmax, softmax
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, roc_auc_score
from test_report import Page
from test_stages import copied, where

from pipeline.final_model.candidates import choose
from pipeline.probe import Cell, best_cell
from pipeline.scoring.metrics import MEASURES, by_image, judged_by, undefined, validation
from pipeline.stage1 import stage1
from pipeline.stage_runtime.errors import ParamError
from pipeline.stage_runtime.schema import arguments
from pipeline.statistics.significance import (
    accuracy_interval,
    difference,
    measure_difference,
    measure_interval,
)
from pipeline.statistics.verdict import measure_in_words, verdicts
from pipeline.training.best_epoch import History, Stop, clearly_better, quality
from pipeline.training.interpolate import choose_factor
from runs.simulate import promised

CLASSED = ("balanced_accuracy", "f1_macro", "auroc")


def drawn(n, classes, seed=0, skew=1.0):
    """Scores with ties (N, C) and labels (N,) of classes that get rarer by a factor."""
    random = np.random.default_rng(seed)
    shares = skew ** np.arange(classes)
    labels = random.choice(classes, n, p=shares / shares.sum())
    labels[:classes] = range(classes)
    scores = random.normal(size=(n, classes))
    scores[np.arange(n), labels] += 1
    return scores.round(1), labels


@pytest.mark.parametrize(("n", "classes"), [(40, 2), (200, 3), (300, 7)])
def test_the_mean_over_images_is_scikit_learns_measure(n, classes):
    scores, labels = drawn(n, classes, skew=0.6)
    p, answers = np.exp(log_softmax(scores, axis=1)), scores.argmax(1)
    ranked = p[:, 1] if classes == 2 else p
    wanted = {
        "accuracy": (answers == labels).mean(),
        "balanced_accuracy": balanced_accuracy_score(labels, answers),
        "f1_macro": f1_score(labels, answers, average="macro"),
        "auroc": roc_auc_score(labels, ranked, multi_class="ovr"),
        "log_loss": -log_loss(labels, p),
    }
    assert set(wanted) == set(MEASURES)
    for measure, value in wanted.items():
        assert by_image(measure, scores, labels).mean() == pytest.approx(value, abs=1e-9), measure


@pytest.mark.parametrize("measure", CLASSED)
@pytest.mark.parametrize("classes", [2, 4])
def test_the_spread_over_images_is_that_of_leaving_each_out(measure, classes):
    scores, labels = drawn(250, classes, seed=1, skew=0.7)
    values, n = by_image(measure, scores, labels), len(labels)
    without = [
        by_image(measure, np.delete(scores, i, 0), np.delete(labels, i)).mean() for i in range(n)
    ]
    jackknife = n * values.mean() - (n - 1) * np.array(without)
    assert np.corrcoef(values, jackknife)[0, 1] > 0.9999
    assert values.std() == pytest.approx(jackknife.std(), rel=0.03)


def test_classes_that_do_not_occur():
    scores, labels = drawn(60, 4)
    scores, labels = scores[labels < 3], labels[labels < 3]
    answers, occurring = scores.argmax(1), [0, 1, 2]
    assert (answers == 3).any()  # some are called a class that no image has
    found = by_image("f1_macro", scores, labels).mean()
    wanted = f1_score(labels, answers, labels=occurring, average="macro")
    assert found == pytest.approx(wanted)
    recalls = [(answers[labels == c] == c).mean() for c in occurring]
    assert by_image("balanced_accuracy", scores, labels).mean() == pytest.approx(np.mean(recalls))
    assert by_image("auroc", scores, labels) is None
    judged, values = judged_by("auroc", scores, labels)
    assert judged == "log_loss"
    assert values.mean() == pytest.approx(-log_loss(labels, softmax(scores, 1), labels=range(4)))
    said = undefined("auroc", labels, list("abcd"), "validation")
    assert said.startswith("validation has no image of class 'd'")
    assert not undefined("f1_macro", labels, list("abcd"), "validation")
    val = validation(scores, labels, measure="auroc")
    assert "auroc" not in val
    assert quality(val, "auroc") == (-val["loss"],)
    assert clearly_better({**val, "loss": val["loss"] - 1}, val, 45, "auroc")
    assert not clearly_better({**val, "loss": val["loss"] - 0.01}, val, 45, "auroc")


@pytest.mark.parametrize("measure", CLASSED)
@pytest.mark.parametrize(
    ("n", "share", "groups"), [(100, 0.5, 0), (100, 0.1, 0), (600, 0.1, 0), (600, 0.3, 30)]
)
def test_intervals_hold_the_measure_of_all_images(measure, n, share, groups):
    found = promised(measure, n, share, groups, draws=300)
    assert found.covered > 0.91, "misses too often"
    assert found.false < 0.08, "finds differences where there are none"


def test_a_p_value_is_low_exactly_if_the_interval_excludes_no_difference():
    scores, labels = drawn(200, 3)
    for shift in (0.0, 0.5, 1.0, 2.0):
        other = scores + shift * np.eye(3)[labels]
        for measure in MEASURES:
            a, b = (by_image(measure, s, labels) for s in (other, scores))
            found = measure_difference(measure, a, b, labels, np.arange(200) % 40)
            assert (found["p_value"] < 0.05) == (not found["low"] <= 0 <= found["high"])
            assert found["value"] == pytest.approx(
                (b - a).mean() if measure == "log_loss" else (a - b).mean()
            )


def test_a_rare_class_without_an_error_is_not_known_well():
    labels = np.repeat([0, 1], [490, 10])
    scores = np.eye(2)[labels] * 5
    for measure in CLASSED:
        low, high = measure_interval(
            measure, by_image(measure, scores, labels), labels, np.arange(500)
        )
        assert high == 1
        assert 0.8 < low < 0.95  # ten of ten alone: above .72


def test_accuracy_keeps_its_interval_and_few_groups_have_none():
    scores, labels = drawn(90, 3)
    groups = np.arange(90) % 10
    values = by_image("accuracy", scores, labels)
    right = scores.argmax(1) == labels
    assert measure_interval("accuracy", values, labels, groups) == accuracy_interval(right, groups)
    other = np.roll(right, 1)
    found = measure_difference("accuracy", values, other.astype(float), labels, groups)
    wanted = difference(right, other, groups)
    assert found == {"value": wanted.pop("accuracy"), **wanted}
    for measure in MEASURES:
        v = by_image(measure, scores, labels)
        assert measure_interval(measure, v, labels, groups % 2) is None
        assert measure_difference(measure, v, v, labels, groups % 2)["p_value"] is None


def test_log_loss_is_less_where_it_is_better():
    scores, labels = drawn(300, 3)
    groups = np.arange(300)
    better, worse = (by_image("log_loss", s, labels) for s in (scores, scores * 4))
    low, high = measure_interval("log_loss", better, labels, groups)
    assert 0 < low < log_loss(labels, softmax(scores, 1)) < high
    found = measure_difference("log_loss", better, worse, labels, groups)
    assert found["high"] < 0
    gains = {"accuracy": 0.0, "low": -0.1, "high": 0.1, "p_value": 1.0}
    measured = {"name": "log_loss", "stage2_minus_probe": found, "chosen_minus_probe": found}
    first, second = verdicts({"chosen": "stage2", "measure": measured, "stage2_minus_probe": gains})
    assert first.startswith("fine-tuning helped: stage 2 minus probe -")
    assert "nats of log loss" in first
    assert second.startswith("fine-tuning made no significant difference: ")


def test_an_epoch_and_a_factor_are_chosen_by_the_measure_then_by_loss():
    def val(accuracy, auroc, loss=1.0, error=0.01):
        return {"accuracy": accuracy, "auroc": auroc, "loss": loss, "auroc_error": error}

    stop = Stop("best", 0, "auroc")
    assert stop.improves(val(0.8, 0.9), val(0.9, 0.8))
    assert stop.improves(val(0.8, 0.9, 0.5), val(0.9, 0.9))
    assert not stop.improves(val(0.9, 0.9), val(0.8, 0.9))
    assert stop.prefers(val(0.8, 0.9), val(0.9, 0.8), 100)
    last = Stop("last", 0, "auroc")
    assert last.prefers(val(0.8, 0.92), val(0.9, 0.9), 100)
    assert not last.prefers(val(0.9, 0.91), val(0.8, 0.9), 100)
    curve = [(0.0, val(0.9, 0.8)), (0.5, val(0.8, 0.9)), (1.0, val(0.85, 0.7))]
    assert choose_factor(curve, stop, 100)[0] == 0.5
    assert choose_factor(curve, Stop("best", 0), 100)[0] == 0.0
    table = History("auroc")
    rows = [table.row(i, None, val(*pair)) for i, pair in enumerate([(0.9, 0.8), (0.8, 0.9)])]
    assert table.best(rows, start_counts=True) == (1, 0.9)
    assert History("log_loss").columns == History("accuracy").columns
    losses = Stop("best", 0, "log_loss")
    assert losses.improves({"accuracy": 0.1, "loss": 0.4}, {"accuracy": 0.9, "loss": 0.5})


def test_a_cell_wins_by_its_loss_among_those_that_tie_by_the_measure():
    def cell(c, loss, measured):
        return Cell("linear", "last", c, loss, [0.5] * 4, measured)

    best = cell(1.0, 0.5, [0.90, 0.92, 0.94, 0.96])
    tied = cell(2.0, 0.4, [0.93, 0.90, 0.95, 0.92])  # .005 ± .016 behind
    behind = cell(3.0, 0.1, [0.87, 0.90, 0.91, 0.93])  # .0275 ± .0025 behind
    assert best_cell([best, tied, behind]).c == 2.0
    assert best_cell([best, behind]).c == 1.0
    # Where a fold has no value, the loss alone decides.
    assert best_cell([best, tied, cell(3.0, 0.1, None)]).c == 3.0


class Of:
    """A candidate of which only the validation scores count."""

    def __init__(self, val):
        self.val = val


def test_the_final_model_is_chosen_by_the_measure():
    labels = np.repeat([0, 1], [270, 30])
    # Stage 2 never says 1, the probe finds all of it at the price of more mistakes.
    p = np.full(300, 0.1)
    q = np.where((labels == 1) | (np.arange(300) < 60), 0.9, 0.1)
    found = {name: Of(np.log(np.stack([1 - x, x], 1))) for name, x in (("stage2", p), ("probe", q))}
    names, groups = ["probe", "stage2"], np.arange(300)
    assert choose(found, names, labels, groups, 2.0) is found["stage2"]
    for measure in CLASSED:
        assert choose(found, names, labels, groups, 2.0, measure) is found["probe"], measure


def test_a_wrong_measure_is_refused_in_a_line():
    params = read_params()
    params["measure"] = "auc"
    with pytest.raises(ParamError, match="measure"):
        arguments(stage1, params)


@pytest.fixture(scope="module")
def by_auroc(finished, tmp_path_factory):
    """A whole run whose measure is AUROC."""
    folder = copied(finished, tmp_path_factory.mktemp("measure"), "prepared", "features")
    params = read_params(measure="auroc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELINE_CACHE", str(folder / "cache"))
        run(folder, params, "probe", "advise", "stage1", "stage2", "evaluate", "report")
    return folder


def test_a_run_by_another_measure_writes_it_everywhere(by_auroc):
    out = where(by_auroc)
    metrics = json.loads((out["out"] / "metrics.json").read_text())
    measured, chosen = metrics["measure"], metrics["chosen"]
    assert measured["name"] == "auroc"
    assert measured["value"] == metrics["test"][chosen]["auroc"] == measured["test"][chosen]
    assert measured["low"] <= measured["value"] <= measured["high"]
    models = paths(by_auroc)["probe"]["out"].parent
    for stage in ("probe", "stage1", "stage2"):
        val = json.loads((models / stage / "metrics.json").read_text())[stage]["val"]
        assert 0 <= val["auroc"] <= 1
    for file in ("stage1/history.csv", "stage2/history.csv", "stage2/interpolation.csv"):
        rows = list(csv.DictReader((models / file).open(newline="")))
        assert all(0 <= float(row["val_auroc"]) <= 1 for row in rows)
    grid = list(csv.DictReader((models / "probe" / "grid.csv").open(newline="")))
    assert all(0 <= float(row["auroc"]) <= 1 for row in grid)
    page = Page(paths(by_auroc)["report"]["out"].read_text())
    said = measure_in_words(measured)
    assert said in page.words
    assert "minus probe" in verdicts(metrics)[0]
    assert "points of AUROC" in verdicts(metrics)[0]
    assert verdicts(metrics)[0][1:] in page.words


def test_the_default_measure_is_the_accuracy_and_adds_no_column(finished):
    metrics = json.loads((where(finished)["out"] / "metrics.json").read_text())
    chosen = metrics["test"][metrics["chosen"]]
    ends = {"value": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
    assert metrics["measure"]["name"] == "accuracy"
    assert all(metrics["measure"][key] == chosen[name] for key, name in ends.items())
    assert metrics["measure"]["val"] == metrics["val"][metrics["chosen"]]
    history = paths(finished)["stage1"]["out"] / "history.csv"
    assert history.read_text().splitlines()[0].endswith("val_loss,val_accuracy")
