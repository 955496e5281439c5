import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.datasets import load_digits, make_classification
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.svm import SVC
from sklearn.utils.class_weight import compute_sample_weight

from pipeline.images.augment import Augment, augment, dihedral
from pipeline.nets.backbone import build
from pipeline.probing.probes import (
    SHARPNESS,
    Scaler,
    class_scores,
    coupled,
    fit_lda,
    fit_linear,
    fit_svm,
    gram,
    head_of,
    linear_probe,
    read_probes,
    save_probes,
    svm_probe,
)
from pipeline.scoring.metrics import balanced_accuracy, cross_entropy, fit_temperature
from pipeline.statistics.verdict import first_unless_clearly_worse, model_scores
from pipeline.training.fit import DivergedError, Recipe, SampleWeights, fit, training_weights
from pipeline.training.schedule import rate


def codes(n_classes: int, n: int = 120):
    x, y = make_classification(
        n, 12, n_informative=8, n_classes=n_classes, class_sep=0.8, random_state=0
    )
    return (x * 3 + 5).astype(np.float32), y


@pytest.mark.parametrize("n_classes", [2, 4])
def test_linear_probe_scores_as_scikit_learn_does(n_classes):
    x, y = codes(n_classes)
    scaler = Scaler.fit(x)
    fitted = LogisticRegression(C=0.1, max_iter=2000, tol=1e-10).fit(scaler(x), y)
    probe = linear_probe(
        fit_linear(scaler(x), y, np.ones(len(y)), 0.1, None), scaler, "last", False, 0.1
    )
    expected = fitted.predict_log_proba(scaler(x))
    actual = torch.log_softmax(torch.from_numpy(probe.scores(x)), 1).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_heads_logits_are_the_probes_scores(n_classes):
    x, y = codes(n_classes)
    scaler = Scaler.fit(x)
    probe = linear_probe(
        fit_linear(scaler(x), y, np.ones(len(y)), 0.1, None), scaler, "last", False, 0.1
    )
    weight, bias = head_of(probe)
    np.testing.assert_allclose(x @ weight.T + bias, probe.scores(x), atol=1e-6)


def margins(fitted, x):
    """Decision values against the first class, as scikit-learn gives them for two classes."""
    found = fitted.decision_function(x)
    return found if found.ndim == 1 else (found - found[:, :1])[:, 1:].squeeze()


@pytest.mark.parametrize("n", [120, 10])  # images, of 12 features
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_lda_is_scikit_learns_and_a_weight_of_two_is_an_image_given_twice(
    n, n_classes, class_weight
):
    x, y = codes(n_classes, 120)
    x, y = Scaler.fit(x)(x)[:n], y[:n]
    times = np.random.default_rng(0).integers(1, 4, n)
    again, labels = np.repeat(x, times, axis=0), np.repeat(y, times)
    shares = np.bincount(y) / n if class_weight is None else np.ones(n_classes) / n_classes
    for shrinkage in (0.1, 0.6, 1.0):
        plain = fit_lda(x, y, np.ones(n), 0.3, class_weight)
        plain = fit_lda(x, y, np.ones(n), shrinkage, class_weight, plain)
        settings = {"solver": "lsqr", "shrinkage": shrinkage}
        direct = LinearDiscriminantAnalysis(priors=shares, **settings).fit(x, y)
        np.testing.assert_allclose(margins(plain, x), margins(direct, x), atol=1e-6)
        if class_weight is None:
            weighted = fit_lda(x, y, times * 0.7, shrinkage, None)
            direct = LinearDiscriminantAnalysis(**settings).fit(again, labels)
            np.testing.assert_allclose(margins(weighted, x), margins(direct, x), atol=1e-6)


def test_lda_of_codes_that_tell_all_there_is_stays_finite():
    x = np.repeat(np.eye(3), 4, axis=0)
    found = fit_lda(x, np.repeat(np.arange(3), 4), np.ones(12), 0.1, None).decision_function(x)
    assert np.isfinite(found).all()
    assert np.array_equal(found.argmax(1), np.repeat(np.arange(3), 4))


@pytest.mark.parametrize("n_classes", [2, 4])
def test_held_out_scores_are_the_probes_and_a_class_never_seen_comes_last(n_classes):
    x, y = codes(n_classes)
    scaler, ones = Scaler.fit(x), np.ones(len(y))
    z = scaler(x)
    kernel = gram(z, z, "svm_rbf", 0.05)
    machine = fit_svm(kernel, y, ones, 1.0, None)
    linear = fit_linear(z, y, ones, 0.1, None)
    for found, probe in (
        (class_scores(linear, z, n_classes + 1), linear_probe(linear, scaler, "last", False, 0.1)),
        (
            class_scores(machine, kernel, n_classes + 1),
            svm_probe(machine, z, scaler, "last", "svm_rbf", 0.05, False),
        ),
    ):
        np.testing.assert_allclose(found[:, :n_classes], probe.scores(x), atol=1e-9)
        assert np.array_equal(found[:, n_classes], found[:, :n_classes].min(1))


@pytest.mark.parametrize("kind", ["svm_linear", "svm_rbf"])
@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_svm_probe_scores_as_scikit_learn_does(tmp_path, kind, n_classes):
    x, y = codes(n_classes)
    scaler, gamma, weights = Scaler.fit(x), 0.05, np.linspace(0.5, 1, len(y))
    train, new = slice(0, 80), slice(80, None)
    z = scaler(x[train])
    machine = fit_svm(gram(z, z, kind, gamma), y[train], weights[train], 1.0, "balanced")
    probe = svm_probe(machine, z, scaler, "last", kind, gamma, False)
    save_probes(tmp_path / "p.safetensors", probe, probe, {})
    probe = read_probes(tmp_path / "p.safetensors")[0]
    sklearn_kernel = "linear" if kind == "svm_linear" else "rbf"
    settings = {"class_weight": "balanced", "decision_function_shape": "ovo"}
    direct = SVC(kernel=sklearn_kernel, gamma=gamma, C=1.0, **settings)
    direct.fit(z, y[train], weights[train])
    decisions = direct.decision_function(scaler(x[new]))
    scores = probe.scores(x[new])
    actual = scores[:, 1] - scores[:, 0] if n_classes == 2 else scores
    expected = decisions if n_classes == 2 else coupled(decisions)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize("n_classes", [3, 7, 300])
def test_pairs_that_fit_together_are_coupled_to_the_probabilities_they_come_from(n_classes):
    p = np.random.default_rng(0).dirichlet(np.ones(n_classes), 30)
    i, j = np.triu_indices(n_classes, 1)
    decisions = (np.log(p[:, i]) - np.log(p[:, j])) / SHARPNESS  # sigmoid: p_i / (p_i + p_j)
    np.testing.assert_allclose(np.exp(coupled(decisions)), p, rtol=1e-8)


def test_an_svms_confidence_tells_right_from_wrong_on_noised_digits():
    """Ten classes: votes, which scikit-learn gives, have an AUROC of .73 for being right here."""
    x, y = load_digits(return_X_y=True)
    found = []
    for seed in range(3):
        random = np.random.default_rng(seed)
        order, noised = random.permutation(len(x)), x + random.normal(0, 5, x.shape)
        train, val, test = np.split(order, [600, 800])
        z = Scaler.fit(noised[train])(noised)
        machine = fit_svm(
            gram(z[train], z[train], "svm_rbf", 1 / 64), y[train], np.ones(600), 3.0, None
        )
        on_val, on_test = (
            class_scores(machine, gram(z[s], z[train], "svm_rbf", 1 / 64), 10) for s in (val, test)
        )
        temperature = fit_temperature(on_val, y[val])
        p = softmax(on_test / temperature, axis=1)
        right = p.argmax(1) == y[test]
        votes = SVC(C=3.0, gamma=1 / 64).fit(z[train], y[train]).predict(z[test]) == y[test]
        loss = cross_entropy(on_test, y[test], temperature)
        found.append((right.mean(), votes.mean(), roc_auc_score(right, p.max(1)), loss))
    accuracy, by_votes, auroc, loss = np.mean(found, axis=0)
    assert auroc >= 0.85
    assert accuracy >= by_votes - 0.005
    assert loss < 0.5  # .61 by votes, .56 for a linear probe


def test_a_linear_probe_is_the_same_from_any_start():
    """On codes of unlike variance, where a solver that stops early differs by whole logits."""
    random = np.random.default_rng(0)
    x = (
        random.normal(size=(300, 200))
        @ np.diag(1 / np.arange(1, 201))
        @ random.normal(size=(200, 200))
    )
    y = (x[:, 0] + random.normal(0, x[:, 0].std(), 300) > 0).astype(int)
    z, ones = Scaler.fit(x)(x), np.ones(300)
    cold = fit_linear(z, y, ones, 0.1, None).decision_function(z)
    path = None
    for c in (10.0, 1.0, 0.001, 0.1):
        path = fit_linear(z, y, ones, c, None, path)
    settings = {"solver": "newton-cholesky", "tol": 1e-10, "max_iter": 500}
    exact = LogisticRegression(C=0.1, **settings).fit(z, y).decision_function(z)
    assert np.abs(cold - exact).max() < 0.01
    assert np.abs(path.decision_function(z) - exact).max() < 0.01


def test_a_feature_that_never_changes_is_only_centred():
    scaled = Scaler.fit(np.full((5, 1), 7.0))(np.array([[7.0], [8.0]]))
    assert scaled.tolist() == [[0.0], [1.0]]


def torch_rates(make, steps_an_epoch, epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    found = []
    for _ in range(epochs):
        for _ in range(steps_an_epoch):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            if isinstance(schedule, torch.optim.lr_scheduler.CosineAnnealingLR):
                schedule.step()
        if isinstance(schedule, torch.optim.lr_scheduler.StepLR):
            schedule.step()
    return found


def test_cosine_falls_as_torchs_does():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), 5, 4)
    assert [rate("cosine", s, 5, 4) for s in range(20)] == pytest.approx(expected)


def test_steps_are_those_of_the_tutorials_step_lr():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.1), 3, 25)
    assert [rate("step", s, 3, 25, 0, 7, 0.1) for s in range(75)] == pytest.approx(expected)


def test_warm_up_rises_linearly_to_the_full_rate():
    found = [rate("constant", s, 4, 2, warmup_epochs=0.75) for s in range(5)]
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0]


HOW = Augment("dihedral", 0.5, 0.3)
PIXELS = torch.randint(0, 256, (6, 20, 20), dtype=torch.uint8, generator=torch.manual_seed(0))
IDS = np.arange(6) * 7


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., None].repeat(1, 1, 1, 3)])
def test_augmentation_depends_on_seed_epoch_and_image_alone(pixels):
    whole = augment(pixels, IDS, 3, 1, HOW)
    assert whole.shape == pixels.shape
    order = [4, 0, 5]
    assert torch.equal(augment(pixels[order], IDS[order], 3, 1, HOW), whole[order])
    for epoch, seed, ids in ((4, 1, IDS), (3, 2, IDS), (3, 1, IDS + 1)):
        assert not torch.equal(augment(pixels, ids, epoch, seed, HOW), whole)


def test_augmentation_switched_off_changes_nothing():
    assert torch.equal(augment(PIXELS, IDS, 1, 0, Augment("none", 1.0, 0.0)), PIXELS.float())


def test_dihedral_kinds_are_the_eight_flips_and_turns():
    image = PIXELS[:1]
    turned = [np.rot90(image[0].numpy(), k) for k in range(4)]
    expected = {a.tobytes() for t in turned for a in (t.copy(), t[:, ::-1].copy())}
    assert {dihedral(image, kind)[0].numpy().tobytes() for kind in range(8)} == expected


@pytest.mark.parametrize(("flips", "axes"), [("horizontal", [()]), ("both", [(), (0,)])])
def test_flips_are_those_allowed(flips, axes):
    many = PIXELS[:1].repeat(60, 1, 1)
    found = augment(many, np.arange(60), 1, 0, Augment(flips, 1.0, 0.0)).to(torch.uint8)
    expected = {np.flip(PIXELS[0].numpy(), (*a, *b)).tobytes() for a in axes for b in ((), (1,))}
    assert {f.numpy().tobytes() for f in found} == expected


def test_class_weights_are_scikit_learns_balanced_ones():
    y = np.array([0, 0, 0, 1, 2, 2])
    expected = compute_sample_weight("balanced", y)
    found = training_weights(y, np.array([9.0] + [1.0] * 5), 3, SampleWeights(False, "balanced"))
    np.testing.assert_allclose(found, expected / expected.mean())
    assert (
        training_weights(y, np.array([2.0] * 6), 3, SampleWeights(True, "none")).tolist()
        == [1.0] * 6
    )


def test_a_loss_that_is_no_number_stops_with_epoch_and_rate():
    model = build("timm/test_efficientnet", 2)
    recipe = Recipe(2, 4, "sgd", 0.5, 1.0, 0.0, 0.9, "constant", 0, 7, 0.1, 0.0, 0.0)
    epochs = fit(
        model,
        lambda x: model(x) * float("nan"),
        lambda _epoch, rows: torch.ones(len(rows), 3, 64, 64),
        np.array([0, 1] * 4),
        np.ones(8),
        recipe,
        seed=0,
    )
    with pytest.raises(DivergedError, match=r"epoch 1: the loss is nan at learning rate 0\.5"):
        next(epochs)


def test_temperature_undoes_a_known_one():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) > random.random((20_000, 1))).argmax(1)
    assert fit_temperature(logits * 2.5, labels) == pytest.approx(2.5, rel=0.03)


def test_balanced_accuracy_is_scikit_learns_over_the_classes_that_occur():
    random = np.random.default_rng(0)
    labels, predicted = random.choice([0, 1, 3], 60), random.integers(0, 5, 60)
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(labels, predicted) == pytest.approx(expected)


def test_cross_entropy_is_torchs():
    scores, labels = np.random.default_rng(0).normal(size=(9, 4)), np.arange(9) % 4
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(scores) / 2, torch.from_numpy(labels)
    )
    assert cross_entropy(scores, labels, 2.0) == pytest.approx(float(expected))


def test_test_metrics_are_scikit_learns_and_null_where_a_class_is_missing():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(60, 3)), random.integers(0, 3, 60)
    found = model_scores(scores, labels, np.ones(60))
    p = torch.softmax(torch.from_numpy(scores), 1).numpy()
    assert found["f1_macro"] == pytest.approx(f1_score(labels, scores.argmax(1), average="macro"))
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, p, multi_class="ovr"))
    assert found["accuracy_weighted"] == found["accuracy"]
    assert model_scores(scores, labels % 2, np.ones(60))["auroc"] is None


def test_the_first_model_is_chosen_unless_another_is_clearly_better_by_hand():
    """Of 100 images 3 are right for the first model alone and 5 for the other one: .02 apart."""
    first, other = np.ones(100, bool), np.ones(100, bool)
    first[:5], other[5:8] = False, False
    error = np.sqrt((8 - 100 * 0.02**2) / 100**2)  # .0282
    each = np.arange(100)
    assert first_unless_clearly_worse([first, other], each, 0.02 / error + 0.01) == 0
    assert first_unless_clearly_worse([first, other], each, 0.02 / error - 0.01) == 1
    assert first_unless_clearly_worse([first, other], each, 0) == 1
    assert first_unless_clearly_worse([other, first, other], each, 0) == 0
    # Of those that are clearly better, the best one.
    best = np.ones(100, bool)
    assert first_unless_clearly_worse([first, other, best], each, 0) == 2
    # Each image twice, as a group: the same accuracies with as much evidence as before.
    twice = np.repeat(each, 2)
    models = [np.repeat(first, 2), np.repeat(other, 2)]
    assert first_unless_clearly_worse(models, twice, 0.02 / error + 0.01) == 0
    assert first_unless_clearly_worse(models, twice, 0.02 / error - 0.01) == 1
