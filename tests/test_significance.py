"""Intervals and p-values hold where groups are few or unequal, and all or none are right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, t, ttest_rel

from pipeline.statistics.reliability import Sure, sure_in_words, sure_threshold
from pipeline.statistics.significance import (
    LEAST_GROUPS,
    accuracy_interval,
    difference,
    least_accuracy,
    over_resplits,
)
from pipeline.statistics.verdict import TOO_FEW, fine_tuning_verdict, interval_in_words
from runs import simulate


def test_the_interval_of_145_of_153_single_images_is_wilsons():
    right = np.arange(153) < 145
    found = accuracy_interval(right, np.arange(153))
    wilson = binomtest(145, 153).proportion_ci(method="wilson")
    assert found == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert [round(end, 3) for end in found] == [0.900, 0.973]


def test_an_interval_widens_where_groups_answer_alike():
    groups = np.repeat(np.arange(20), 10)
    right = np.random.default_rng(0).random(20)[groups] > 0.3
    alone, grouped = accuracy_interval(right, np.arange(200)), accuracy_interval(right, groups)
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


def test_many_equal_groups_give_the_cluster_t_interval():
    """With 200 groups the usual correlation counts for nothing beside the measured one."""
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(200), 20)
    right = random.random(4000) < random.beta(5, 2, 200)[groups]
    means = right.reshape(200, 20).mean(1)
    arm = t.ppf(0.975, 199) * means.std(ddof=1) / np.sqrt(200)
    low, high = accuracy_interval(right, groups)
    assert (high - low) / (2 * arm) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("b", "c"), [(12, 3), (10, 2), (6, 0), (5, 0), (8, 1), (30, 12)])
def test_the_p_value_of_single_images_is_near_mcnemars(b, c):
    """Between the mid-p test and the exact one (Fagerland et al. 2013), or a hundredth beside."""
    same = [True] * 60 + [False] * 25
    a_right = np.array([*same, *[True] * b, *[False] * c])
    b_right = np.array([*same, *[False] * b, *[True] * c])
    found = difference(a_right, b_right, np.arange(len(a_right)))
    exact = binomtest(c, b + c).pvalue
    mid = exact - binom.pmf(c, b + c, 0.5)
    assert mid - 0.01 < found["p_value"] < exact + 0.01


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=400, deadline=None)
def test_interval_and_p_value_never_disagree(sizes, rates, seed):
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    of_group = np.clip(random.normal(0, 0.3, (2, len(sizes))), -1, 1)
    a, b = (random.random(len(groups)) < r + of_group[i][groups] for i, r in enumerate(rates))
    found = difference(a, b, groups)
    interval = accuracy_interval(a, groups)
    assert found["accuracy"] == pytest.approx(a.mean() - b.mean())
    if len(sizes) < LEAST_GROUPS:
        assert (found["low"], found["high"], found["p_value"], interval) == (None,) * 4
        assert least_accuracy(a, groups, 0.9) is None
        return
    excludes = found["low"] > 0 or found["high"] < 0
    assert excludes == (found["p_value"] < 0.05)
    assert found["low"] < found["high"]
    assert found["low"] <= found["accuracy"] <= found["high"]
    assert 0 <= interval[0] < interval[1] <= 1
    assert interval[0] <= a.mean() <= interval[1]


def test_one_group_and_one_more_right_says_nothing():
    a, b = np.ones(100, bool), np.ones(100, bool)
    b[0] = False
    found = difference(a, b, np.zeros(100, int))
    assert found == {"accuracy": 0.01, "low": None, "high": None, "p_value": None}
    assert TOO_FEW in fine_tuning_verdict(found)
    assert "helped" not in fine_tuning_verdict(found)


@pytest.mark.parametrize("size", [10, 30, 1000])
def test_three_groups_that_gain_alike_are_no_proof(size):
    groups = np.repeat([0, 1, 2], size)
    a, b = np.ones(3 * size, bool), np.ones(3 * size, bool)
    for group in range(3):
        b[group * size : group * size + size // 10] = False
    found = difference(a, b, groups)
    assert found["accuracy"] == pytest.approx(0.1)
    assert found["low"] < 0 < found["high"]
    assert "no significant difference" in fine_tuning_verdict(found)


def test_all_right_in_several_groups_is_no_certainty():
    low, high = accuracy_interval(np.ones(60, bool), np.repeat(np.arange(5), 12))
    assert high == pytest.approx(1)
    assert low < 0.95


def test_equal_models_have_an_interval_around_nothing():
    a = np.array([True, False] * 10)
    found = difference(a, a, np.arange(20))
    assert (found["accuracy"], found["p_value"]) == (0, 1)
    assert found["low"] == -found["high"] < 0


def test_a_group_that_holds_nearly_all_images_says_little():
    sizes = [300, *[1] * 11]
    right = np.random.default_rng(0).random(311) < 0.9
    low, high = accuracy_interval(right, np.repeat(np.arange(12), sizes))
    assert high - low > 0.4


def test_what_is_said_of_missing_intervals_is_words():
    assert interval_in_words(None, None) == TOO_FEW
    assert interval_in_words(0.5, 0.75) == "0.500 to 0.750"
    found = {"accuracy": 0.02, "low": 0.01, "high": 0.03, "p_value": 0.001}
    assert fine_tuning_verdict(found).startswith(
        "fine-tuning helped: stage 2 minus probe +2.0 points"
    )
    assert fine_tuning_verdict({**found, "low": -0.3, "high": -0.1}).startswith("fine-tuning hurt")


def test_re_splits_are_tested_as_nadeau_and_bengio_do():
    """By hand: the paired t-test with its variance times 1 + 5 × ratio."""
    a, b = [0.90, 0.92, 0.91, 0.95, 0.93], [0.88, 0.91, 0.87, 0.91, 0.92]
    plain = ttest_rel(a, b).statistic
    for ratio in (0.0, 1 / 3):
        low, high, p = over_resplits(a, b, ratio, paired=True)
        by_hand = plain / np.sqrt(1 + 5 * ratio)
        assert p == pytest.approx(2 * t.sf(by_hand, 4))
        assert (low > 0) == (p < 0.05)
    assert over_resplits([0.9], [0.8], 0.1, paired=True) is None
    assert over_resplits([0.9, 0.8], [0.8, 0.7], 0.1, paired=True) is None  # no spread
    low, high, p = over_resplits([0.9, 0.8, 0.85], [0.7, 0.72], 0.1, paired=False)
    assert low < 0.14 < high


def test_the_lower_bound_of_single_images_is_clopper_and_pearsons():
    right = np.arange(100) < 97
    found = least_accuracy(right, np.arange(100), 0.9)
    assert found == pytest.approx(binomtest(97, 100).proportion_ci(0.8, "exact").low)
    assert least_accuracy(np.ones(45, bool), np.arange(45), 0.9) == pytest.approx(0.1 ** (1 / 45))
    assert least_accuracy(np.zeros(9, bool), np.arange(9), 0.9) == 0
    assert least_accuracy(right, np.repeat(np.arange(10), 10), 0.9) < found


def two_classes(confidence):
    return np.stack([confidence, 1 - confidence], 1)


def test_a_threshold_is_one_that_enough_are_right_above():
    confidence = np.concatenate([np.linspace(0.99, 0.97, 200), np.linspace(0.7, 0.5, 100)])
    labels = np.concatenate([np.zeros(200, int), np.arange(100) % 2])
    found = sure_threshold(two_classes(confidence), labels, np.arange(300), 0.95)
    above = confidence >= found.above
    right = int((labels[above] == 0).sum())
    assert 0.5 < found.above < 0.98
    assert found.images is None
    assert beta.ppf(0.1, right, above.sum() - right + 1) >= 0.95
    assert sure_threshold(two_classes(confidence), labels, np.arange(300), 0.5) == Sure(0.0, None)


def test_without_a_promise_it_is_said_how_many_images_one_would_take():
    confidence = np.linspace(0.999, 0.95, 30)
    found = sure_threshold(two_classes(confidence), np.zeros(30, int), np.arange(30), 0.95)
    assert found.above is None
    assert 45 <= found.images < 500
    assert f"about {found.images} validation images" in sure_in_words(None, 0.95, found.images)
    many = np.tile(confidence, -(-found.images // 30))[: found.images]
    n = len(many)
    assert sure_threshold(two_classes(many), np.zeros(n, int), np.arange(n), 0.95).above is not None
    confidence, labels = np.full(50, 0.6), np.arange(50) % 2
    unsure = sure_threshold(two_classes(confidence), labels, np.arange(50), 0.95)
    assert unsure == Sure(None, None)
    assert "a more confident model" in sure_in_words(None, 0.95, None)


def test_groups_that_answer_alike_promise_less():
    confidence, labels = np.linspace(0.999, 0.9, 300), np.zeros(300, int)
    alone = sure_threshold(two_classes(confidence), labels, np.arange(300), 0.95)
    grouped = sure_threshold(two_classes(confidence), labels, np.arange(300) % 6, 0.95)
    assert alone.above is not None
    assert grouped.above is None
    assert sure_threshold(two_classes(confidence), labels, np.zeros(300), 0.95).above is None


@pytest.mark.long
def test_intervals_hold_the_truth_and_few_differences_are_invented():
    found = list(simulate.cells(draws=2000))
    assert len(found) == 72
    for covered in ([c.covered for c in found], [c.difference_covered for c in found]):
        assert np.mean(covered) >= 0.93
        assert min(covered) >= 0.91
    assert max(cell.false for cell in found) <= 0.06
    assert max(simulate.ratios_of_means(found)) <= 1.3
    assert np.mean([cell.t_covered for cell in found]) < 0.9  # so the cells are hard ones


@pytest.mark.long
def test_what_is_called_sure_is_right_as_often_as_promised():
    found = list(simulate.promises(draws=1000))
    assert min(promise.held for promise in found) >= 0.9
    of_use = {p.shape: p.used for p in found if p.images == 300}
    assert min(of_use["two ends"], of_use["beta, steep"]) >= 0.6
