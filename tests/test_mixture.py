import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import paths, read_params, run
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from test_stages import copied, where

from pipeline.final_model import classifier
from pipeline.final_model.candidates import SINGLE
from pipeline.final_model.mixture import IMAGES, cross_fitted, fit_mixture
from pipeline.images.shards import read_images
from pipeline.nets import checkpoint
from pipeline.stage_runtime.errors import ParamError


def drawn(n, skills=(1.0, 1.5, 1.2), classes=3, seed=0):
    """Labels (N,) and the scores (N, C) of models that know more or less about them."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    truth = np.eye(classes)[labels]
    return [random.normal(0, 1, (n, classes)) + skill * truth for skill in skills], labels


@pytest.mark.parametrize("n", [30, 300])
def test_the_weights_have_the_highest_posterior_density(n):
    scores, labels = drawn(n)
    found = fit_mixture(scores, labels)
    each = zip(scores, found.temperatures, strict=True)
    p = np.stack([softmax(s / t, axis=1)[np.arange(n), labels] for s, t in each], axis=1)

    def cost(logits):
        w = softmax(logits)
        return -(np.log(p @ w).sum() + IMAGES * np.log(w).sum())

    expected = softmax(minimize(cost, np.zeros(3), tol=1e-9).x)
    assert max(expected) - min(expected) > 0.05
    assert found.weights == pytest.approx(expected, abs=1e-3)


def test_thirty_images_that_are_all_right_make_no_model_certain():
    labels = np.arange(30) % 3
    scores = [4 * np.eye(3)[labels] + shift for shift in (0, 0.1)]
    found = fit_mixture(scores, labels)
    assert min(found.temperatures) > 0.3
    wrong = found.log_probabilities([s[:1, ::-1] for s in scores])[0, labels[0]]
    assert -25 < wrong < 0


def test_a_model_that_knows_nothing_is_left_out_where_images_are_many():
    scores, labels = drawn(1000, (3.0, 0.0))
    assert fit_mixture(scores, labels).weights == [1.0, 0.0]
    scores, labels = drawn(10, (3.0, 0.0))
    assert min(fit_mixture(scores, labels).weights) > 0.1


def test_the_log_probabilities_are_those_of_a_weighted_mean():
    scores, labels = drawn(50)
    how = fit_mixture(scores, labels)
    each = zip(how.weights, scores, how.temperatures, strict=True)
    mean = sum(w * softmax(s / t, axis=1) for w, s, t in each)
    power = mean ** (1 / how.temperature)
    expected = power / power.sum(1, keepdims=True)
    assert np.exp(how.log_probabilities(scores)) == pytest.approx(expected)
    alone = fit_mixture(scores[:1], labels)
    scaled = log_softmax(scores[0] / alone.temperatures[0], axis=1)
    assert alone.log_probabilities(scores[:1]) == pytest.approx(scaled)


def test_what_is_said_of_an_image_does_not_depend_on_its_groups_labels():
    scores, labels = drawn(60)
    groups = np.arange(60) // 4
    before = cross_fitted(scores, labels, groups)
    for group in (0, 7):
        held = groups == group
        changed = np.where(held, (labels + 1) % 3, labels)
        after = cross_fitted(scores, changed, groups)
        assert np.array_equal(after[held], before[held])
        assert not np.array_equal(after[~held], before[~held])
    one = cross_fitted(scores, labels, np.zeros(60, int))
    assert np.array_equal(one, fit_mixture(scores, labels).log_probabilities(scores))


def test_the_final_blend_is_the_mean_of_its_members_in_memory_and_on_disk(finished):
    images = read_images(paths(finished)["prepare"]["out"], "test")
    final = classifier.load(where(finished)["final"] / "model.safetensors")
    assert final.chosen == "blend"
    assert [member.name for member in final.members] == list(reversed(SINGLE))
    mean = sum(m.weight * softmax(m.scores(images) / m.temperature, axis=1) for m in final.members)
    power = mean ** (1 / final.temperature)
    found = final.probabilities(images)
    assert found == pytest.approx(power / power.sum(1, keepdims=True))
    assert sum(member.weight for member in final.members) == pytest.approx(1)
    metrics = json.loads((where(finished)["out"] / "metrics.json").read_text())
    assert metrics["chosen"] == "blend"
    assert set(metrics["test"]["blend"]) == set(metrics["test"]["probe"])
    assert set(metrics["chosen_minus_probe"]) == set(metrics["stage2_minus_probe"])


def test_a_final_model_of_an_earlier_version_answers_as_it_did(finished, tmp_path):
    final = classifier.load(where(finished)["final"] / "model.safetensors")
    images = read_images(paths(finished)["prepare"]["out"], "test")
    for place, member in enumerate(final.members):
        file = tmp_path / f"{place}.safetensors"
        alone = replace(member, temperature=1.0, weight=1.0)
        replace(final, members=[alone], temperature=1.7, chosen=member.name).save(file)
        tensors, meta = checkpoint.read(file)
        for key in ("member", "members", "member_temperature", "weight"):
            del meta[key]
        checkpoint.write(file, tensors, meta)
        read = classifier.load(file)
        assert read.members[0].name == member.name
        expected = softmax(member.scores(images) / 1.7, axis=1)
        assert read.probabilities(images) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ([], "evaluate.candidates: name one or more of probe, stage1, stage2"),
        (["blend"], "evaluate.candidates: name one or more of probe, stage1, stage2"),
        (["probe", "blend"], "evaluate.candidates: a blend of probe alone"),
    ],
)
def test_candidates_that_leave_nothing_to_choose_or_blend_are_refused(
    candidates, said, finished, tmp_path
):
    folder = copied(finished, tmp_path, "prepared", "models", "features")
    with pytest.raises(ParamError, match=said):
        run(folder, read_params(evaluate={"candidates": candidates}), "evaluate")


@pytest.mark.parametrize(
    ("candidates", "chosen", "members"),
    [(["probe", "stage2"], "stage2", 1), (["stage1", "blend", "probe"], "blend", 2)],
)
def test_a_model_that_is_no_candidate_is_compared_but_not_used(
    candidates, chosen, members, finished, tmp_path
):
    folder = copied(finished, tmp_path, "prepared", "models", "features")
    run(folder, read_params(evaluate={"candidates": candidates, "tie": 5.0}), "evaluate")
    final = classifier.load(where(folder)["final"] / "model.safetensors")
    assert (final.chosen, len(final.members)) == (chosen, members)
    metrics = json.loads((where(folder)["out"] / "metrics.json").read_text())
    assert {"probe", "probe_linear", "stage1", "stage2"} <= set(metrics["test"])
    assert ("blend" in metrics["test"]) == ("blend" in candidates)
