import csv
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import TINY, paths, read_params, run, write_photos
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC
from torch import nn

from pipeline.evaluate import _trunk
from pipeline.final_model import classifier
from pipeline.images.shards import read_images, read_splits
from pipeline.inference.tta import TTA, logits
from pipeline.nets import checkpoint
from pipeline.nets.backbone import Backbone, backbone_of, head_name, rebuild
from pipeline.nets.network import load
from pipeline.probe import Cell, best_cell
from pipeline.probing.codes import read_codes
from pipeline.probing.probes import KINDS, head_of, read_probes
from pipeline.training.best_epoch import Stop, best_epoch, clearly_better, quality
from pipeline.training.fit import Epoch
from pipeline.training.head import head_views
from pipeline.training.interpolate import between, choose_factor
from pipeline.training.resume_state import ResumeState
from pipeline.training.schedule import epochs_of


def where(folder):
    return paths(folder)["evaluate"]


def copied(finished, tmp_path, *names):
    """A copy of the finished run's folders, to run later stages on."""
    for name in names:
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path


def history(folder, stage):
    with (where(folder)[stage].parent / "history.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_every_stage_leaves_the_files_of_the_contract(finished):
    names = {str(f.relative_to(finished / "models")) for f in (finished / "models").rglob("*.*")}
    assert names == {
        *("probe/probe.safetensors", "probe/grid.csv", "probe/metrics.json"),
        *("probe/out_of_fold.csv", "report/validation.csv"),
        *(f"stage{i}/{n}" for i in (1, 2) for n in ("model.safetensors", "history.csv")),
        *("stage1/metrics.json", "stage2/metrics.json", "stage2/interpolation.csv"),
        *("report/metrics.json", "report/confusion.csv", "report/per_class.csv"),
        *("report/predictions.csv", "final/model.safetensors"),
        *(f"advice/{name}" for name in ("advice.json", "advice.txt", "profile.csv")),
        *("report/advice.json", "report/index.html"),
    }


def test_history_has_a_row_an_epoch_and_one_before_the_first(finished):
    for stage in ("stage1", "stage2"):
        rows = history(finished, stage)
        assert list(rows[0]) == [
            *("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
        ]
        assert [row["epoch"] for row in rows] == ["0", "1", "2"]


def test_stage_2_starts_where_stage_1_ended(finished):
    said = checkpoint.read(where(finished)["stage1"])[1]["val"]
    first = history(finished, "stage2")[0]
    assert float(first["val_loss"]) == said["loss"]
    assert float(first["val_accuracy"]) == said["accuracy"]


def test_stage_1_starts_as_the_linear_probe(finished):
    """With the same pixels at extract and stage 1, epoch 0 is the probe's validation."""
    said = checkpoint.read(where(finished)["probe"])[1]["val"]
    first = history(finished, "stage1")[0]
    assert float(first["val_loss"]) == pytest.approx(said["loss"], abs=1e-4)


def test_stage_1_moves_what_it_unfreezes_and_stage_2_everything(finished, tmp_path):
    folder = copied(finished, tmp_path, "prepared", "models")
    random_head = {"head_init": "random"}  # which any epoch is better than
    run(folder, read_params(stage1=random_head), "stage1")
    first, meta = checkpoint.read(where(folder)["stage1"])
    assert meta["epoch"] > 0
    drawn = rebuild(backbone_of(meta)).state_dict()
    unfrozen = [k for k in first if k.startswith(("blocks.4", "classifier"))]
    frozen = [k for k in first if k not in unfrozen]
    assert frozen
    assert all(np.array_equal(first[k], drawn[k].numpy()) for k in frozen)
    weights = [k for k in unfrozen if k.startswith("blocks") and k.endswith("weight")]
    assert weights
    assert not any(np.array_equal(first[k], drawn[k].numpy()) for k in weights)

    run(folder, read_params(stage2={"interpolate": False}), "stage2")
    second = checkpoint.read(paths(folder)["stage2"]["out"] / "model.safetensors")[0]
    assert not any(np.array_equal(first[k], second[k]) for k in first if k.endswith("weight"))


def test_from_scratch_stage_1_trains_everything_and_the_statistics(finished, tmp_path):
    folder = copied(finished, tmp_path, "prepared")
    params = read_params(backbone={"weights": "none"})
    assert params["stage1"]["head_init"] == "probe"  # which is passed over
    run(folder, params, "extract", "probe", "stage1", "stage2")
    assert float(history(folder, "stage1")[0]["val_loss"]) == pytest.approx(np.log(2), abs=0.2)
    backbone = Backbone(TINY, "none", "", (), (), params["seed"])
    drawn = rebuild(backbone).state_dict()
    found, meta = checkpoint.read(where(folder)["stage1"])
    assert meta["backbone"]["weights"] == "none"
    still = [k for k, t in drawn.items() if not k.startswith("classifier")]
    still = [k for k in still if np.array_equal(found[k], drawn[k].numpy())]
    assert still == []


def test_stage_2_trains_every_parameter_at_its_default_rate(finished, tmp_path):
    folder = copied(finished, tmp_path, "prepared", "models")
    run(folder, read_params(stage2={"interpolate": False, "epochs": 1}), "stage2")
    first = checkpoint.read(where(folder)["stage1"])[0]
    second = checkpoint.read(where(folder)["stage2"])[0]
    trained = [k for k in first if "running" not in k and "num_batches" not in k]
    still = [k for k in trained if np.array_equal(first[k], second[k])]
    assert still == []
    statistics = [k for k in first if k not in trained]
    assert all(np.array_equal(first[k], second[k]) for k in statistics)


def test_a_reloaded_checkpoint_predicts_the_same_to_the_bit(finished, tmp_path):
    network, _ = load(where(finished)["stage2"])
    images = read_images(paths(finished)["prepare"]["out"], "test")
    tta = TTA("none", 1)
    expected = logits(network, images, tta)
    network.save(tmp_path / "again.safetensors", **{"val": 1})
    rebuild = load(tmp_path / "again.safetensors")[0]
    assert np.array_equal(logits(rebuild, images, tta), expected)


def test_two_saves_give_the_same_bytes(finished, tmp_path):
    network, meta = load(where(finished)["stage2"])
    for name in "ab":
        network.save(tmp_path / name, **meta)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_trunk_outputs_that_do_not_fit_the_cache_give_the_same_bytes(
    finished, tmp_path, monkeypatch
):
    folder = copied(finished, tmp_path, "prepared", "models")
    monkeypatch.setenv("PIPELINE_CACHE_GB", "0")
    run(folder, read_params(), "stage1")
    assert_same_training(finished, folder)


def test_trunk_outputs_of_an_earlier_run_give_the_same_bytes(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "prepared", "models")
    run(folder, read_params(stage1={"lr": 1e-3}), "stage1")
    assert "read from the cache" not in capsys.readouterr().out
    run(folder, read_params(), "stage1")
    assert capsys.readouterr().out.count("read from the cache") == 2  # train and val
    assert_same_training(finished, folder)


def assert_same_training(one, two):
    """Refuse another model, or other losses on the way to it: the model may be the start's."""
    losses = [row["val_loss"] for row in history(one, "stage1")]
    assert len(set(losses)) == len(losses)
    assert history(one, "stage1") == history(two, "stage1")
    assert where(one)["stage1"].read_bytes() == where(two)["stage1"].read_bytes()


def test_stage_1_says_what_the_probes_head_is_worth_at_its_size(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "prepared", "models")
    run(folder, read_params(stage1={"epochs": 1, "image_size": 24}), "stage1")
    start = history(folder, "stage1")[0]
    assert (
        f"epoch   0  val loss {float(start['val_loss']):.4f} acc {float(start['val_accuracy']):.4f}"
        ": the probe's head, fitted anew at 24 px (1.0000 on the codes of 64 px)"
    ) in capsys.readouterr().out
    run(folder, read_params(stage1={"epochs": 1, "head_init": "random"}), "stage1")
    assert "the probe's head" not in capsys.readouterr().out


@pytest.mark.parametrize("flips", ["none", "horizontal"])
def test_at_another_size_the_head_is_scikit_learns_on_codes_of_single_views(
    flips, finished, tmp_path
):
    folder = copied(finished, tmp_path, "prepared", "models")
    still = {"epochs": 1, "image_size": 24, "views": 1, "lr": 1e-12}
    run(folder, read_params(stage1=still, flips=flips), "stage1")
    network, _ = load(where(folder)["stage1"])
    codes: list[torch.Tensor] = []
    head = network.model.get_submodule(head_name(network.model))
    head.register_forward_pre_hook(lambda _, inputs: codes.append(inputs[0]))
    (rows,), (images,) = read_splits(where(folder)["prepared"], ["train"])
    pixels = images[np.arange(len(images))]
    views = [pixels, np.flip(pixels, 2)][: 1 if flips == "none" else 2]
    margins, x = [], []
    for view in views:
        found = logits(network, np.ascontiguousarray(view), TTA("none", 1))
        margins.append(found[:, 1] - found[:, 0])
        x.append(torch.cat(codes)[: len(images)].double().numpy())
        codes.clear()
    c = checkpoint.read(where(folder)["probe"])[1]["linear"]["c"]
    regression = LogisticRegression(C=c / len(views), tol=1e-8, max_iter=9999)
    expected = make_pipeline(StandardScaler(), regression)
    expected.fit(np.concatenate(x), np.tile(rows.labels, len(views)))
    assert np.std(margins) > 0.1
    assert np.concatenate(margins) == pytest.approx(
        expected.decision_function(np.concatenate(x)), abs=1e-3
    )


def test_stage_1_keeps_the_probes_head_where_no_epoch_is_better(finished, tmp_path):
    folder = copied(finished, tmp_path, "prepared", "models")
    run(folder, read_params(stage1={"lr": 0.3, "optimizer": "sgd", "epochs": 1}), "stage1")
    rows = history(folder, "stage1")
    assert float(rows[1]["val_accuracy"]) < float(rows[0]["val_accuracy"])
    _, meta = checkpoint.read(where(folder)["stage1"])
    assert (meta["epoch"], meta["val_accuracy"]) == (0, float(rows[0]["val_accuracy"]))
    run(folder, read_params(), "stage2")  # which has to find the network that was kept


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"unfreeze": [], "head_init": "random"}, {}),
        ({"batchnorm": "train", "views": 0}, {"batchnorm": "train"}),
        ({"image_size": 48}, {"image_size": 64}),
        (  # the recipe of PyTorch's transfer-learning tutorial
            {"optimizer": "sgd", "lr": 1e-3, "schedule": "step", "momentum": 0.9, "views": 0},
            {"optimizer": "sgd"},
        ),
        ({"label_smoothing": 0.1, "warmup_epochs": 0.5, "layer_decay": 0.5}, {"patience": 1}),
    ],
    ids=["head only", "batch statistics", "another size", "tutorial", "the rest"],
)
def test_every_way_to_train_goes_through(finished, tmp_path, first, second):
    folder = copied(finished, tmp_path, "prepared", "features", "models")
    params = read_params(
        stage1=first,
        stage2=second,
        augment={"crop": 0.5, "light": 0.2},
        flips="dihedral",
        class_weight="balanced",
    )
    run(folder, params, "stage1", "stage2", "evaluate")
    zeros = [row for row in history(folder, "stage2") if row["epoch"] == "0"]
    assert len(zeros) == (2 if "image_size" in first else 1)
    metrics = json.loads((where(folder)["stage2"].parent / "metrics.json").read_text())
    assert f"{metrics['stage2']['start_accuracy']:.6f}" == f"{float(zeros[-1]['val_accuracy']):.6f}"


def test_training_stops_after_patience_epochs_without_a_better_one(finished, tmp_path):
    folder = copied(finished, tmp_path, "prepared", "models")
    run(
        folder,
        read_params(stage1={"epochs": 9, "patience": 2, "lr": 1e-9, "keep": "best"}),
        "stage1",
    )
    metrics = json.loads((where(folder)["stage1"].parent / "metrics.json").read_text())["stage1"]
    assert metrics["epochs"] == metrics["best_epoch"] + 2 < 9


@pytest.mark.parametrize(
    ("keep", "accuracies", "n", "kept"),
    [
        ("last", [0.5, 0.7, 0.9, 0.8], 0, 3),
        ("best", [0.5, 0.7, 0.9, 0.8], 0, 2),
        ("best", [0.9, 0.7, 0.7, 0.6], 0, 1),  # the start is no candidate: the first of equals
        ("best", [0.9, 0.7, 0.8, 0.8], 100, 0),
        ("last", [0.84, 0.7, 0.9, 0.8], 100, 3),  # .04 of the start's is less than .054
        ("last", [0.9, 0.7, 0.9, 0.8], 100, 0),
    ],
)
def test_the_epoch_that_is_kept_by_hand(keep, accuracies, n, kept, tmp_path):
    def val(accuracy):
        return {"accuracy": accuracy, "balanced_accuracy": accuracy, "loss": 1.0}

    model = nn.Linear(1, 1, bias=False)
    model.weight.data.zero_()
    start, *later = accuracies
    scores = iter(later)

    def epochs():
        for number in range(1, len(later) + 1):
            model.weight.data.fill_(number)
            yield Epoch(number, 0.1, 1.0, 0.5, 0.0)

    run = ("stage1", tmp_path, model, epochs(), lambda: val(next(scores)), [val(start)])
    state = ResumeState(tmp_path / "training.safetensors")
    found = best_epoch(*run, Stop(keep, 0), state, n, start_counts=n > 0)
    assert (found.epoch, found.val["accuracy"]) == (kept, accuracies[kept])
    assert model.weight.item() == kept
    said = json.loads((tmp_path / "metrics.json").read_text())["stage1"]
    assert (said["best_epoch"], said["epochs"]) == (kept, len(later))


def test_a_start_is_clearly_better_by_more_than_the_standard_error_of_the_difference():
    def val(right):
        return {"accuracy": right / 100, "loss": 1.0}

    # (.9 * .1 + .86 * .14) / 100 has the root .0459, and with .85 .0466.
    assert not clearly_better(val(90), val(86), 100)
    assert clearly_better(val(90), val(85), 100)
    assert not clearly_better(val(90), val(90), 100)


def test_the_better_epoch_has_more_accuracy_then_less_loss_then_is_the_earlier():
    def val(accuracy, loss):
        return {"accuracy": accuracy, "loss": loss}

    assert quality(val(0.9, 2.0)) > quality(val(0.8, 1.0))
    assert quality(val(0.9, 0.5)) > quality(val(0.9, 1.0))
    assert Stop("best", 0).prefers(val(0.9, 1.0), val(0.9, 1.0), 100)
    assert not Stop("best", 0).prefers(val(0.9, 1.0), val(0.9, 0.5), 100)


def test_the_factor_is_the_best_then_the_smallest_on_validation():
    def val(accuracy, loss):
        return {"accuracy": accuracy, "loss": loss}

    curve = [(0.0, val(0.8, 0.3)), (0.5, val(0.9, 0.2)), (0.8, val(0.9, 0.2)), (1.0, val(0.9, 0.4))]
    stop = Stop("best", 0)
    assert choose_factor(curve, stop, 100)[0] == 0.5
    assert choose_factor([(0.0, val(0.9, 0.2)), (1.0, val(0.9, 0.2))], stop, 100)[0] == 0.0


def test_the_end_of_training_counts_unless_another_factor_is_clearly_better():
    def curve(between, end):
        return [(0.5, {"accuracy": between, "loss": 1.0}), (1.0, {"accuracy": end, "loss": 1.0})]

    # On 100 images the standard error of .90 - .86 is .0459, and on 200 it is .0325.
    stop = Stop("last", 0)
    assert choose_factor(curve(0.90, 0.86), stop, 100)[0] == 1.0
    assert choose_factor(curve(0.90, 0.86), stop, 200)[0] == 0.5


@pytest.mark.parametrize(
    ("asked", "images", "batch_size", "epochs"),
    [
        (7, 100, 32, 7),
        ("auto", 1673, 32, 6),  # 52 steps an epoch
        ("auto", 1600, 32, 6),  # 50
        ("auto", 1632, 32, 6),  # 51
        ("auto", 100_000, 32, 4),
        ("auto", 200, 32, 10),
        ("auto", 20, 32, 10),  # one batch of 20
        ("auto", 1600, 16, 4),  # 100
    ],
)
def test_few_images_get_more_epochs(asked, images, batch_size, epochs):
    assert epochs_of(asked, images, batch_size) == epochs


def test_the_head_is_fitted_on_an_image_and_one_flip_where_images_are_few():
    assert [head_views(flips, 50_000) for flips in ("none", "horizontal", "dihedral")] == [1, 2, 2]
    assert head_views("dihedral", 50_001) == 1


def test_between_two_states_is_their_weighted_mean():
    first, second = {"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([1.0, 8.0])}
    assert between(first, second, 0.25)["w"].tolist() == [0.25, 5.0]
    assert torch.equal(between(first, second, 0.0)["w"], first["w"])


def test_equal_cells_go_to_the_simpler_kind_then_to_the_smaller_c():
    cells = [Cell(kind, "last", c, 0.3, (0.9, 0.8)) for kind in KINDS[::-1] for c in (1.0, 0.1)]
    assert best_cell(cells) == Cell("linear", "last", 0.1, 0.3, (0.9, 0.8))
    assert best_cell([*cells, Cell("svm_rbf", "last", 1.0, 0.2, (0.7, 0.8))]).kind == "svm_rbf"


def test_the_probes_cross_validation_is_scikit_learns(finished, tmp_path):
    """One cell of the grid against a direct SVC on the same folds."""
    from scipy.optimize import minimize_scalar
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict, cross_val_score

    params = read_params(
        probe={"kinds": ["svm_rbf"], "svm_rbf_c": [3.0]}, sample_weight=False, seed=0
    )
    folder = copied(finished, tmp_path, "features")
    run(folder, params, "probe")
    features = folder / "features"
    codes = read_codes(features, "train", "last")
    with (features / "labels.csv").open() as lines:
        labels = [int(row["label"]) for row in csv.DictReader(lines) if row["split"] == "train"]
    z = (codes - codes.mean(0, dtype=float)) / codes.std(0, dtype=float)
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    machine = SVC(C=3.0, gamma=1 / z.shape[1])
    expected = cross_val_score(machine, z, labels, cv=folds).mean()
    decisions = cross_val_predict(machine, z, labels, cv=folds, method="decision_function")
    loss = minimize_scalar(
        lambda log_t: log_loss(labels, expit(decisions / np.exp(log_t))),
        bounds=(-4, 4),
        method="bounded",
    ).fun
    with (folder / "models" / "probe" / "grid.csv").open() as lines:
        (found,) = [
            r for r in csv.DictReader(lines) if (r["kind"], r["depth"]) == ("svm_rbf", "last")
        ]
    assert float(found["accuracy"]) == pytest.approx(expected, abs=1e-6)
    assert float(found["loss"]) == pytest.approx(loss, abs=1e-4)


def test_a_probe_is_the_same_whatever_the_number_of_threads(finished, tmp_path, monkeypatch):
    folder, found = copied(finished, tmp_path, "features"), []
    for number in ("1", "3"):
        monkeypatch.setenv("PIPELINE_THREADS", number)
        run(folder, read_params(), "probe")
        out = paths(folder)["probe"]["out"]
        found.append([(out / name).read_bytes() for name in ("probe.safetensors", "grid.csv")])
    assert found[0] == found[1]


def test_codes_of_unit_length_are_scikit_learns_and_the_heads_probe_keeps_its_own(
    finished, tmp_path
):
    folder = copied(finished, tmp_path, "features")
    params = read_params(probe={"kinds": ["svm_rbf"], "l2": True, "join": 0}, sample_weight=False)
    run(folder, params, "probe")
    winner, linear, _ = read_probes(where(folder)["probe"])
    features = folder / "features"
    with (features / "labels.csv").open() as lines:
        labels = [int(row["label"]) for row in csv.DictReader(lines) if row["split"] == "train"]
    train, test = (
        np.asarray(read_codes(features, split, winner.depth)) for split in ("train", "test")
    )
    machine = SVC(C=winner.c, gamma=1 / train.shape[1])
    direct = make_pipeline(Normalizer(), StandardScaler(), machine).fit(train, labels)
    found = winner.scores(test)
    # Single precision: a feature that is the same for all rows is rounding, divided by rounding.
    np.testing.assert_allclose(found[:, 1] - found[:, 0], direct.decision_function(test), atol=1e-4)
    assert (winner.l2, linear.l2) == (True, False)


def test_stage_1s_head_is_the_linear_probe_even_when_an_svm_won(finished, tmp_path):
    folder = copied(finished, tmp_path, "prepared", "features")
    run(folder, read_params(probe={"kinds": ["svm_rbf"]}, stage1={"lr": 1e-12}), "probe", "stage1")
    winner, linear, _ = read_probes(where(folder)["probe"])
    assert (winner.kind, linear.kind) == ("svm_rbf", "linear")
    network, _ = load(where(folder)["stage1"])
    head = network.model.get_submodule(head_name(network.model))
    weight, bias = head_of(linear)
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, atol=1e-6)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, atol=1e-6)


def test_svms_see_a_stratified_subsample(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "features")
    run(folder, read_params(probe={"svm_max_images": 10}), "probe")
    assert "SVMs are fitted on 10 of 18 images (probe.svm_max_images)" in capsys.readouterr().out


def test_a_network_made_for_larger_images_than_the_packed_ones_is_named(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path, "prepared")
    run(folder, read_params(extract={"image_size": "auto"}), "extract")
    line = f"{TINY} was made for 160 px, and sees 64: prepare.size is 64"
    assert line in capsys.readouterr().out
    run(folder, read_params(extract={"image_size": 48}), "extract")
    assert "was made for" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [TINY, "timm/test_vit"])
def test_images_so_small_that_blocks_return_one_pixel_go_through_the_graph(name, tmp_path):
    write_photos(tmp_path / "photos")
    sizes = {"image_size": 16 if name != TINY else 32}
    params = read_params(
        backbone={"name": name, "weights": "none", "sha256": ""},
        prepare={"path": str(tmp_path / "photos"), "size": 32},
        extract=sizes,
        stage1={**sizes, "epochs": 1, "unfreeze": []},
        stage2={**sizes, "epochs": 1},
    )
    run(tmp_path, params)
    metrics = json.loads((tmp_path / "models/report/metrics.json").read_text())
    assert set(metrics["test"]) == {"probe", "probe_linear", "stage1", "stage2", "blend"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_model_works_alone_whichever_probe_won(finished, tmp_path, kind):
    folder = copied(finished, tmp_path, "prepared", "models", "features")
    params = read_params(
        probe={"kinds": [kind]},
        extract={"depths": ["blocks.1"]},
        stage1={"head_init": "random", "lr": 1e-9, "epochs": 1},
        stage2={"lr": 1e-9, "epochs": 1},
        evaluate={"views": 1, "candidates": ["probe"]},
    )
    run(folder, params, "extract", "probe", "stage1", "stage2", "evaluate")
    final = classifier.load(where(folder)["final"] / "model.safetensors")
    assert final.chosen == "probe"
    features = paths(folder)["extract"]["out"]
    [member] = final.members
    expected = member.probe.scores(read_codes(features, "test", member.probe.depth)).argmax(1)
    found = final.probabilities(read_images(paths(folder)["prepare"]["out"], "test"))
    assert np.array_equal(found.argmax(1), expected)
    assert found.sum(1) == pytest.approx(np.ones(len(found)))


@pytest.mark.parametrize("pooling", ["average", "max", "both"])
def test_the_final_model_makes_the_codes_that_extract_made(finished, tmp_path, pooling):
    folder = copied(finished, tmp_path, "prepared", "models")
    depth = "blocks.1+blocks.3"
    params = read_params(extract={"depths": depth.split("+"), "pooling": pooling, "views": 2})
    run(folder, params, "extract", "probe", "evaluate")
    final = classifier.load(where(folder)["final"] / "model.safetensors")
    images = read_images(paths(folder)["prepare"]["out"], "test")
    network = _trunk(read_probes(where(folder)["probe"])[2])
    assert all(member.pooling == pooling for member in final.members)
    for name in (depth, "last", "source"):
        found = classifier.codes(network, name, pooling, images, TTA("horizontal", 2))
        assert np.array_equal(found, read_codes(folder / "features", "test", name))
    with (folder / "models" / "probe" / "grid.csv").open() as lines:
        assert depth in {row["depth"] for row in csv.DictReader(lines)}


def test_without_a_test_split_there_is_no_verdict_but_a_final_model(tmp_path):
    params = read_params(
        prepare={"path": str(write_photos(tmp_path / "photos")), "test_fraction": 0.0}
    )
    run(tmp_path, params)
    metrics = json.loads((where(tmp_path)["out"] / "metrics.json").read_text())
    assert metrics["test"] == {}
    assert set(metrics) == {"test", "chosen", "val"}
    assert (where(tmp_path)["final"] / "model.safetensors").exists()


def test_three_classes_of_grey_images_go_through(tmp_path):
    folder = write_photos(tmp_path / "photos", classes=3, grey=True)
    run(tmp_path, read_params(prepare={"path": str(folder)}))
    metrics = json.loads((where(tmp_path)["out"] / "metrics.json").read_text())
    assert set(metrics["test"]) == {"probe", "probe_linear", "stage1", "stage2", "blend"}


def test_images_that_an_svm_leaves_out_have_no_answer_out_of_fold(finished, tmp_path):
    """The linear probe answers all, the winner those it was fitted on, each by another fold."""
    folder = copied(finished, tmp_path, "features")
    run(folder, read_params(probe={"kinds": ["svm_rbf"], "svm_max_images": 10}), "probe")
    with (paths(folder)["probe"]["out"] / "out_of_fold.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    with (folder / "features" / "labels.csv").open(newline="") as lines:
        train = [row for row in csv.DictReader(lines) if row["split"] == "train"]
    assert [(row["id"], row["path"]) for row in rows] == [(r["id"], r["path"]) for r in train]
    assert all(row["probe_linear"] in ("class0", "class1") for row in rows)
    answered = [row for row in rows if row["probe"]]
    assert len(answered) == 10 < len(rows)
    for row in rows:
        assert bool(row["probe"]) == bool(row["probability"]) == bool(row["uncalibrated"])
    assert all(0.5 <= float(row["probability"]) <= 1 for row in answered)


def test_no_two_threads_read_the_head_of_an_array_at_once(finished, monkeypatch):
    """Python 3.11 fails at it now and then, as `ast` is not safe there."""
    inside, most, load_array = [], [], np.load

    def slow(*given, **more):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return load_array(*given, **more)

    monkeypatch.setattr(np, "load", slow)
    features = paths(finished)["extract"]["out"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_codes(features, "train", "last"), range(8)))
    assert len(most) == 8
    assert max(most) == 1
