"""Advice against hand-computed cases, and against what a whole run brought."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import paths, read_params, run
from scipy.stats import t

from pipeline.advice import prior_results as known
from pipeline.advice.prior_results import LARGE, OURS, PUBLISHED, PriorResult, expected_gain
from pipeline.advice.throughput import Throughput
from pipeline.advice.transferability import (
    Transferability,
    case_of,
    profile,
    source_confidence,
    source_information,
    transferability,
)
from pipeline.advise import Lengths, _advice, durations, paragraph
from pipeline.images.augment import Augment


def odds(p):
    return math.log(p / (1 - p))


def share(log_odds):
    return 1 / (1 + math.exp(-log_odds))


# What known sets let one expect


def test_a_gain_is_a_difference_of_log_odds():
    assert PriorResult("a", 100, 0.8, 0.9).gain == pytest.approx(math.log(9 / 4))


def test_sets_that_all_gained_alike_leave_no_doubt():
    alike = [
        PriorResult("", n, p, share(odds(p) + 0.5)) for n, p in ((100, 0.6), (900, 0.8), (70, 0.9))
    ]
    found = expected_gain(300, 0.7, 0.75, alike)
    expected = share(odds(0.7) + 0.5) - 0.75
    assert [found.low, found.gain, found.high] == pytest.approx([expected] * 3)


def test_two_sets_of_one_size_give_students_prediction_interval():
    pair = [PriorResult("", 500, 0.7, share(odds(0.7) + gain)) for gain in (0.2, 0.6)]
    found = expected_gain(500, 0.8, 0.8, pair)
    deviation = math.sqrt((0.2**2 + 0.2**2) / 1)
    reach = t.ppf(0.9, 1) * deviation * math.sqrt(1 + 1 / 2)
    assert found.sets == pytest.approx(2)
    assert found.gain == pytest.approx(share(odds(0.8) + 0.4) - 0.8)
    assert found.high == pytest.approx(share(odds(0.8) + 0.4 + reach) - 0.8)
    assert found.low == pytest.approx(share(odds(0.8) + 0.4 - reach) - 0.8)


def test_sets_of_like_size_speak_louder():
    small, large = PriorResult("", 300, 0.8, 0.8), PriorResult("", 60_000, 0.8, 0.9)
    gains = [expected_gain(n, 0.8, 0.8, [small, large]).gain for n in (300, 4_000, 60_000)]
    assert 0 <= gains[0] < 0.005 < gains[1] < 0.09 < gains[2] <= 0.1


def test_large_is_where_the_published_gains_begin():
    gains = {True: [], False: []}
    for one in PUBLISHED:
        gains[one.images >= LARGE].append(one.gain)
    assert np.median(gains[True]) == pytest.approx(0.99, abs=0.01)
    assert np.median(gains[False]) == pytest.approx(0.03, abs=0.01)


def test_pretrained_weights_won_on_all_published_sets_but_one():
    assert [k.name for k in PUBLISHED if k.scratch >= k.fine_tuned] == ["Birdsnap"]


# The evidence


def test_the_sources_confidence_is_its_mean_highest_probability():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]])
    assert source_confidence(logits) == pytest.approx(0.6)


def test_source_classes_tell_all_of_labels_that_they_are():
    labels = np.array([0, 1, 2, 2])
    assert source_information(1e3 * np.eye(5)[labels], labels) == pytest.approx(1)


def test_source_classes_tell_nothing_of_labels_that_they_do_not_follow():
    labels = np.array([0, 1, 0, 1])
    assert source_information(np.zeros((4, 5)), labels) == pytest.approx(0)


def test_source_information_is_leep_written_out():
    random = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 1, 1, 2])
    p = random.dirichlet(np.ones(4), len(labels))
    leep = 0.0
    for row, y in enumerate(labels):
        likelihood = 0.0
        for z in range(4):
            likelihood += p[row, z] * p[labels == y, z].sum() / p[:, z].sum()
        leep += math.log(likelihood) / len(labels)
    entropy = -sum(n / 6 * math.log(n / 6) for n in (3, 2, 1))
    assert source_information(np.log(p), labels) == pytest.approx(1 + leep / entropy)


def test_the_profile_is_the_accuracy_of_each_depths_cell_of_the_lowest_loss(tmp_path):
    grid = tmp_path / "grid.csv"
    grid.write_text(
        "kind,depth,c,loss,accuracy\n"
        "linear,a,1,0.5,0.7\nlinear,a,2,0.4,0.6\nsvm_rbf,last,1,0.3,0.9\nlinear,a+b,1,0.1,1.0\n"
        "lda,a,0.1,0.1,0.99\nlda,b,0.1,0.2,0.8\n"
    )
    assert profile(grid, ["a", "b", "c", "last"]) == {"a": 0.6, "b": 0.8, "last": 0.9}


def test_early_is_the_best_of_what_comes_before_the_last_codes():
    by_depth = {"a": 0.5, "b": 0.7, "c": 0.6, "last": 0.8, "source": 0.99}
    found = transferability(np.array([0, 0, 2]), np.array([0, 2]), np.zeros((2, 4)), by_depth)
    assert (0.7, 0.8) == (found.early, found.late)
    assert (3, 3, 1) == (found.images, found.classes, found.smallest_class)


@pytest.mark.parametrize(
    ("images", "information", "case"),
    [
        (LARGE - 1, 0.3, 1),
        (LARGE, 0.3, 2),
        (LARGE - 1, 0.1, 3),
        (LARGE, 0.1, 4),
    ],
)
def test_case_goes_by_size_and_by_what_the_sources_classes_tell(images, information, case):
    assert case_of(Transferability(images, 2, 50, 0.8, 0.8, 0.5, information)) == case


# The advice


def test_a_set_is_no_evidence_for_itself(monkeypatch):
    found = Transferability(500, 2, 50, 0.6, 0.8, 0.5, 0.1)
    accuracies = {"cv_accuracy": 0.8, "linear_cv_accuracy": 0.8}
    of_others, _ = _advice(["x", "y"], found, accuracies)
    monkeypatch.setattr(
        "pipeline.advise.OURS", (*OURS, PriorResult("", 500, 0.1, 0.9, classes=("x", "y")))
    )
    assert _advice(["x", "y"], found, accuracies)[0] == of_others
    assert _advice(["x", "z"], found, accuracies)[0] != of_others


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.05, "it should pay."),
        (-0.1, -0.01, "should not pay"),
        (-0.1, 0.1, "may or may not pay"),
    ],
)
def test_the_words_follow_the_interval(low, high, said):
    expected = known.Expected((low + high) / 2, low, high, 4.0)
    text = paragraph(3, Transferability(500, 2, 50, 0.9, 0.8, 0.5, 0.1), 0.85, expected)
    assert said in text
    assert text.startswith("Case 3: small, unlike")


def test_durations_count_every_pass():
    plain = Augment("both", 1.0, 0.0)
    lengths = Lengths([], 64, 8, 10, 32, 96, 3, 32, 8)
    pace = Throughput(trunk=2.0, top=5.0, step=11.0, first=3.0, second=7.0)
    assert durations(pace, lengths, plain, train=100, val=10, test=20) == {
        # Eight views, and two whole ones for the head.
        "stage1": ((8 + 2) * 100 + 10) * 2 + 10 * (100 * 5 + 10 * 1),
        # Validated before training, after each epoch, and at three factors of interpolation.
        "stage2": 3 * 100 * 11 + (1 + 3 + 3) * 10 * 7,
        "evaluate": 4 * 30 * (3 + 7),  # `both` has four flips
    }
    anew = Lengths([], 64, 0, 10, 32, 96, 3, 32, 8)  # no views kept: the trunk runs every epoch
    assert durations(pace, anew, plain, 100, 10, 20)["stage1"] == ((10 + 2) * 100 + 10) * 2 + 5100
    # 100 images are 3 steps an epoch: ten epochs are the most.
    few = Lengths([], 64, 8, 10, 32, 96, "auto", 32, 8)
    assert durations(pace, few, plain, 100, 10, 20)["stage2"] == 10 * 1100 + (1 + 10 + 3) * 70


def test_a_run_leaves_its_advice_and_what_happened(finished):
    advice = json.loads((paths(finished)["evaluate"]["advice"]).read_text())["advice"]
    text = (paths(finished)["advise"]["out"] / "advice.txt").read_text()
    assert text.startswith(f"Case {advice['case']}: ")
    rows = (paths(finished)["advise"]["out"] / "profile.csv").read_text().splitlines()
    features = json.loads((paths(finished)["advise"]["features"] / "facts.json").read_text())
    assert [row.split(",")[0] for row in rows] == ["depth", *features["depths"]]
    report = paths(finished)["evaluate"]["out"]
    happened = json.loads((report / "advice.json").read_text())["fine_tuning"]
    metrics = json.loads((report / "metrics.json").read_text())
    assert happened["happened"] == metrics["stage2_minus_probe"]["accuracy"]
    assert happened["expected"] == advice["expected_gain"]["gain"]
    assert happened["held"] == (happened["low"] <= happened["happened"] <= happened["high"])


def test_without_pretrained_weights_there_is_no_case(finished, tmp_path):
    for name in ("prepared", "features"):
        shutil.copytree(finished / name, tmp_path / name)
    params = read_params(backbone={"weights": "none"})
    run(tmp_path, params, "extract", "probe", "advise", "stage1", "stage2", "evaluate")
    advice = json.loads((paths(tmp_path)["evaluate"]["advice"]).read_text())["advice"]
    happened = json.loads((paths(tmp_path)["evaluate"]["out"] / "advice.json").read_text())
    assert advice == {"case": None, "expected_gain": None}
    assert happened["fine_tuning"]["held"] is None
