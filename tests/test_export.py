import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TINY, paths
from onnxruntime import InferenceSession
from repository import flat

from pipeline.commands.export import export
from pipeline.commands.predict import load, predict
from pipeline.final_model import classifier
from pipeline.final_model import onnx as portable
from pipeline.final_model.classifier import Classifier, Member
from pipeline.final_model.graph import Graph, SvmHead
from pipeline.final_model.onnx import Portable
from pipeline.final_model.operating_point import Decision
from pipeline.images.shards import read_images, read_rows
from pipeline.inference.tta import TTA
from pipeline.nets.backbone import pretrained
from pipeline.nets.fuse import fuse
from pipeline.nets.network import Network
from pipeline.probing.probes import (
    FITS,
    KINDS,
    Scaler,
    fit_svm,
    gram,
    linear_probe,
    svm_probe,
)
from pipeline.stage_runtime.errors import CheckpointError, DataError
from pipeline.stage_runtime.schema import load_yaml


def fitted_probe(kind, classes, codes, l2=False, depth="last"):
    """A probe of scikit-learn's on codes (N, D) with drawn labels."""
    labels = np.random.default_rng(classes).permutation(np.arange(len(codes)) % classes)
    scaler, ones = Scaler.fit(codes), np.ones(len(codes))
    x, gamma = scaler(codes), 1 / codes.shape[1]
    if kind in FITS:
        fitted = FITS[kind](x, labels, ones, 0.1, None)
        return linear_probe(fitted, scaler, depth, l2, 0.1, kind)
    machine = fit_svm(gram(x, x, kind, gamma), labels, ones, 3.0, None)
    return svm_probe(machine, x, scaler, depth, kind, gamma, l2)


def drawn_classifier(probe, classes, channels, size):
    """A classifier in fp32 whose network is the tiny one with drawn weights."""
    model, backbone = pretrained(TINY, "none", "", 0)
    names = [f"class {i}" for i in range(classes)]
    facts = (backbone, names, size, 64, "crop", channels, "fp32")
    network = Network(fuse(model.eval().requires_grad_(False), "fp32"), *facts)
    return Classifier(
        [Member("probe", network, probe, "both", TTA("dihedral", 8))],
        1.7,
        Decision([0.6] * classes),
        "probe",
    )


def pixels(channels, n=33):
    shape = (n, 64, 64) if channels == 1 else (n, 64, 64, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("l2", [False, True])
def test_a_probes_scores_in_pytorch_are_those_in_numpy(kind, classes, l2):
    seen, codes = np.random.default_rng(1).normal(size=(2, 90, 12)).astype(np.float32)
    probe = fitted_probe(kind, classes, seen, l2)
    found = SvmHead(probe)(torch.from_numpy(codes)).numpy()
    np.testing.assert_allclose(found, probe.scores(codes), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "size", "kind", "classes"),
    [(1, 48, "svm_rbf", 3), pytest.param(3, 64, "linear", 2, marks=pytest.mark.long)],
)
def test_onnx_of_a_probe_answers_as_the_classifier_does(tmp_path, channels, size, kind, classes):
    depth, network = "blocks.2+blocks.3", drawn_classifier(None, classes, channels, size).network
    seen = classifier.codes(network, depth, "both", pixels(channels), TTA("dihedral", 8))
    model = drawn_classifier(
        fitted_probe(kind, classes, seen, depth=depth), classes, channels, size
    )
    portable.write(model, Graph(model), tmp_path / "m.onnx")
    read = Portable(tmp_path / "m.onnx")
    for n in (1, 33):
        images = pixels(channels, n)
        expected = model.probabilities(images)
        assert n == 1 or expected.std(0).min() > 0.05  # else all images would look alike
        np.testing.assert_allclose(read.probabilities(images), expected, atol=1e-4)
    assert read.network.classes == [f"class {i}" for i in range(classes)]
    assert (read.network.packed_size, read.network.fit, read.decision) == (
        64,
        "crop",
        model.decision,
    )


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "export"
    export(**where(finished), out=out)
    return out


def where(finished: Path) -> dict[str, Path]:
    at = paths(finished)
    return {
        "final": at["evaluate"]["final"] / "model.safetensors",
        "report": at["evaluate"]["out"] / "metrics.json",
        "prepared": at["prepare"]["out"],
        "lock": ROOT / "dvc.lock",
    }


def test_an_export_answers_alike_as_onnx_and_as_safetensors(finished, exported):
    rows = read_rows(paths(finished)["prepare"]["out"], "test")
    files = [finished / "photos" / path for path in rows.paths]
    kinds = ("safetensors", "onnx")
    tables = [list(predict(load(exported / f"model.{kind}"), files)) for kind in kinds]
    assert len(tables[0]) == len(rows.paths)
    labels = [[answer.labels[0] for answer in table] for table in tables]
    sure = [answer.probabilities[0] > 0.6 for answer in tables[0]]
    assert sum(sure) > len(sure) / 2
    assert all(a == b for a, b, is_sure in zip(*labels, sure, strict=True) if is_sure)


def test_the_graph_needs_nothing_of_ours(finished, exported):
    onnx.checker.check_model(exported / "model.onnx", full_check=True)
    images = read_images(paths(finished)["prepare"]["out"], "test")
    session = InferenceSession(exported / "model.onnx")
    (answer,) = session.run(["probabilities"], {"pixels": np.array(images)})
    final = classifier.load(where(finished)["final"])
    assert len(final.members) > 1
    members = [
        replace(member, network=replace(member.network, precision="fp32", model=part.model))
        for member, part in zip(final.members, Graph(final).parts, strict=True)
    ]
    expected = replace(final, members=members).probabilities(images)
    np.testing.assert_allclose(answer, expected, atol=1e-4)
    np.testing.assert_allclose(answer.sum(1), 1, atol=1e-5)


def test_the_model_card_says_what_dvc_and_evaluate_recorded(finished, exported):
    card = (exported / "README.md").read_text()
    metrics = json.loads(where(finished)["report"].read_text())
    found = metrics["test"][metrics["chosen"]]
    assert f"{found['accuracy']:.4f} ({found['accuracy_low']:.3f} to" in card
    assert 'The model never says "not sure": no confidence threshold is certain to have 95%' in card
    lock = load_yaml((ROOT / "dvc.lock").read_text())["stages"]
    for out in lock["prepare"]["outs"]:
        assert out["path"] != "data/prepared" or out["md5"] in card
    for key, value in flat(lock["stage2"]["params"]["params.yaml"]).items():
        assert f"| {key} | {json.dumps(value)} |" in card
    assert "| 0 | class0 |\n| 1 | class1 |" in card


def test_export_refuses_what_does_not_belong_together(finished, tmp_path):
    given = where(finished)
    other = json.loads(given["report"].read_text())
    other["chosen"] = "stage1" if other["chosen"] != "stage1" else "stage2"
    (tmp_path / "metrics.json").write_text(json.dumps(other))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for changes, line in (
        ({"report": tmp_path / "metrics.json"}, "metrics.json: it chose"),
        ({"report": tmp_path / "none.json"}, "none.json: no such file; run `dvc repro`"),
        ({"prepared": tmp_path}, "facts.json: no such file; run `dvc repro prepare`"),
        ({"lock": tmp_path / "dvc.lock"}, "dvc.lock: no such file; run `dvc repro`"),
        ({"out": tmp_path / "mine"}, "mine: contains other files than an export"),
    ):
        with pytest.raises(DataError, match=line):
            export(**{**given, "out": tmp_path / "export", **changes})
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not (tmp_path / "export").exists()


def test_what_is_no_export_is_refused_as_one(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    foreign = onnx.helper.make_model(
        onnx.helper.make_graph([node], "foreign", [value], [out]),
        ir_version=10,
        opset_imports=[onnx.helper.make_opsetid("", 18)],
    )
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for name, line in (
        ("missing.onnx", "missing.onnx: can't be read as ONNX"),
        ("broken.onnx", "broken.onnx: can't be read as ONNX"),
        ("foreign.onnx", "foreign.onnx: not written by `python -m pipeline export`"),
    ):
        with pytest.raises(CheckpointError, match=line):
            Portable(tmp_path / name)
