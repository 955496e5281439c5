"""The whole graph on networks of torchvision, on a tiny set and without weights."""

import json

import pytest
from conftest import paths, read_params, run, write_photos

from pipeline.classifier import load
from pipeline.images.pack import read_images, read_rows

TOP = [
    ("resnet18", "layer4"),
    ("mobilenet_v3_small", "features.12"),
    ("efficientnet_b0", "features.8"),
    pytest.param("resnet50", "layer4", marks=pytest.mark.long),
    pytest.param("convnext_tiny", "features.7", marks=pytest.mark.long),
    pytest.param("densenet121", "features.denseblock4", marks=pytest.mark.long),
    pytest.param("vgg11", "classifier", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "top"), TOP)
def test_a_torchvision_network_goes_through_the_whole_graph(tmp_path, name, top):
    write_photos(tmp_path / "photos", each=12)
    params = read_params(
        backbone={"name": f"torchvision/{name}"},
        prepare={"path": str(tmp_path / "photos")},
        stage1={"unfreeze": [top], "epochs": 1},
        stage2={"epochs": 1},
        evaluate={"views": 1},
    )
    run(tmp_path, params)
    at = paths(tmp_path)["evaluate"]
    metrics = json.loads((at["out"] / "metrics.json").read_text())
    assert set(metrics["test"]) == {"probe", "probe_linear", "stage1", "stage2"}
    final = load(at["final"] / "model.safetensors")
    found = final.probabilities(read_images(at["prepared"], "test"))
    right = found.argmax(1) == read_rows(at["prepared"], "test").labels
    assert right.mean() == pytest.approx(metrics["test"][metrics["chosen"]]["accuracy"])
