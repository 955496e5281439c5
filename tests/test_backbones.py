"""The whole graph on networks of torchvision, on a tiny set and without weights."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import TINY, paths, read_params, run, write_photos
from torch import nn

from pipeline.final_model import classifier
from pipeline.images.shards import read_images, read_rows
from pipeline.inference.tta import TTA
from pipeline.nets.backbone import pretrained
from pipeline.nets.network import load
from pipeline.probing.codes import read_codes
from pipeline.stage_runtime.errors import WeightsError

TOP = [
    ("mobilenet_v3_small", "features.12"),
    ("resnet18", "layer4"),
    ("efficientnet_b0", "features.8"),
    ("resnet50", "layer4"),
    ("convnext_tiny", "features.7"),
    ("densenet121", "features.denseblock4"),
    ("vgg11", "classifier"),
    ("mnasnet0_5", "layers.12"),
    ("googlenet", "inception5b"),
    ("inception_v3", "Mixed_7c"),
]


def tamed(name, file):
    """Write drawn weights of a network with the statistics that BatchNorm meets."""
    model, _ = pretrained(name, "none", "", seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches
    model.train()(torch.randn(8, 3, 96, 96))
    torch.save(model.state_dict(), file)
    return {"weights": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.families
@pytest.mark.parametrize(("name", "top"), TOP)
def test_a_torchvision_network_goes_through_the_whole_graph(tmp_path, name, top):
    write_photos(tmp_path / "photos", each=12)
    size, weights = 64, {}
    if name == "inception_v3":  # the least that it takes is 75; as it draws weights, they overflow
        size, weights = 96, tamed(f"torchvision/{name}", tmp_path / "tamed.pth")
    params = read_params(
        backbone={"name": f"torchvision/{name}", **weights},
        prepare={"path": str(tmp_path / "photos"), "size": size},
        extract={"image_size": size},
        stage1={"unfreeze": [top], "epochs": 1, "image_size": size},
        stage2={"epochs": 1, "image_size": size},
        evaluate={"views": 1},
    )
    run(tmp_path, params)
    at = paths(tmp_path)["evaluate"]
    metrics = json.loads((at["out"] / "metrics.json").read_text())
    assert set(metrics["test"]) == {"probe", "probe_linear", "stage1", "stage2"}
    final = classifier.load(at["final"] / "model.safetensors")
    found = final.probabilities(read_images(at["prepared"], "test"))
    right = found.argmax(1) == read_rows(at["prepared"], "test").labels
    assert right.mean() == pytest.approx(metrics["test"][metrics["chosen"]]["accuracy"])


@pytest.mark.parametrize(
    "stage", ["final", *(pytest.param(s, marks=pytest.mark.long) for s in ("stage1", "stage2"))]
)
def test_an_earlier_runs_network_starts_another(finished, tmp_path, stage):
    """Its codes, its classes as the source's, its normalisation: those of the file."""
    file = finished / "models" / stage / "model.safetensors"
    weights = {"weights": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    write_photos(tmp_path / "photos", classes=3)
    params = read_params(backbone=weights, prepare={"path": str(tmp_path / "photos")})
    run(tmp_path, params)
    network = classifier.load(file).network if stage == "final" else load(file)[0]
    images = read_images(tmp_path / "prepared", "test")
    for depth in ("last", "source"):
        found = read_codes(tmp_path / "features", "test", depth)
        expected = classifier.codes(network, depth, "both", images, TTA("horizontal", 1))
        assert np.array_equal(found, expected)
    assert found.shape[1] == network.n_outputs
    final = classifier.load(tmp_path / "models" / "final" / "model.safetensors")
    assert final.network.backbone.sha256 == weights["sha256"]


def test_an_earlier_runs_network_of_another_name_is_refused(finished, tmp_path):
    file = finished / "models" / "stage2" / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=f"weights of {TINY}; set backbone.name to that"):
        pretrained("torchvision/resnet18", str(file), digest, 0)
