"""Networks of many families through the whole graph, by their names alone."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paths, read_params, run, write_photos
from safetensors.torch import load_file, save
from test_resume import Killed, contents, kill_at
from torch import nn

from pipeline.advice import throughput
from pipeline.final_model import classifier, onnx
from pipeline.final_model.graph import Graph
from pipeline.images.shards import read_images
from pipeline.nets import batches
from pipeline.nets.automatic import input_size
from pipeline.nets.backbone import pretrained, skeleton
from pipeline.nets.checkpoint import read
from pipeline.stage1 import stage1
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import arguments
from pipeline.training.resume_state import ResumeState

# By name, and the side of the packed images where 64 pixels are no size of the network's.
FAMILIES = [
    ("timm/test_vit", 64),
    ("timm/test_vit3", 64),  # pooled by attention
    ("timm/test_convnext", 64),
    ("timm/test_byobnet", 64),  # RepVGG's blocks among others
    *(
        pytest.param(name, size, marks=pytest.mark.families)
        for name, size in (
            ("timm/test_vit4", 64),
            ("timm/eva02_tiny_patch14_224", 224),  # published without a classifier
            ("timm/deit_tiny_patch16_224", 64),
            ("timm/beit_base_patch16_224", 224),
            ("timm/vit_small_patch14_reg4_dinov2", 64),  # published without a classifier
            ("timm/vit_small_patch16_dinov3", 64),  # published without a classifier
            ("timm/vit_base_patch32_clip_224", 64),
            ("timm/vit_base_patch16_siglip_224", 64),
            ("timm/swin_tiny_patch4_window7_224", 64),
            ("timm/swinv2_tiny_window8_256", 64),
            ("timm/maxvit_rmlp_pico_rw_256", 256),
            ("timm/cait_xxs24_224", 224),
            ("timm/xcit_nano_12_p16_224", 64),
            ("timm/edgenext_xx_small", 64),
            ("timm/convnextv2_atto", 64),
            ("timm/mobilenetv4_conv_small", 64),
            ("timm/mobilevit_xxs", 64),
            ("timm/fastvit_t8", 64),
            ("timm/hgnetv2_b0", 64),
            ("timm/repvgg_a0", 64),
            ("timm/test_nfnet", 64),
            ("timm/poolformer_s12", 64),
            ("timm/davit_tiny", 64),
            ("timm/regnety_002", 64),
            ("timm/resnet10t", 64),
            ("torchvision/vit_b_16", 224),
            ("torchvision/swin_t", 64),
            ("torchvision/maxvit_t", 224),
        )
    ),
]


def drawn_weights(name: str, size: int, folder: Path) -> dict[str, str]:
    """Draw a network's weights into a file, so that they count as pretrained.

    BatchNorm has the statistics of noise: with its initial ones, activations may explode. Branches
    whose factors begin near zero are as strong as others: else all images have nearly one code.
    """
    model, _ = pretrained(name, "none", "", seed=0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = None  # the mean of all batches so far
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gamma" in parameter_name and parameter.abs().max() < 0.01:
                parameter.fill_(1.0)
        if norms:
            model.train()(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
    content = save(model.state_dict())
    file = folder / "drawn.safetensors"
    file.write_bytes(content)
    return {"weights": str(file), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_a_network_goes_through_the_whole_graph_by_its_name(name, size, tmp_path, monkeypatch):
    # Of 24 images, batches of 32 would be copies for the most part.
    monkeypatch.setattr(batches, "EVAL_BATCH", 8)
    monkeypatch.setattr(throughput, "BATCHES", 1)
    write_photos(tmp_path / "photos", each=12)
    auto = {"image_size": "auto"}
    weights = drawn_weights(name, size, tmp_path)
    params = read_params(
        backbone={"name": name, **weights},
        prepare={"path": str(tmp_path / "photos"), "size": size},
        extract=auto,
        stage1={**auto, "unfreeze": "auto", "epochs": 1, "batch_size": 8, "layer_decay": 0.9},
        stage2={**auto, "epochs": 1, "batch_size": 8, "interpolate": False},
        evaluate={"views": 1},
    )
    run(tmp_path, params)
    at = paths(tmp_path)

    # What stage 1 froze is as it was loaded, parameters and buffers.
    before = load_file(weights["weights"])
    after, meta = read(at["stage1"]["out"] / "model.safetensors")
    inside = tuple(f"{module}." for module in meta["trained"])
    frozen = [n for n in before if not n.startswith(inside) and n not in meta["trained"]]
    assert frozen
    for tensor in frozen:
        np.testing.assert_array_equal(after[tensor], before[tensor].numpy(), err_msg=tensor)
    assert meta["image_size"] == input_size(skeleton(name), "auto", size, of=5 / 7)

    # Stage 2 begins where stage 1 ended.
    with (at["stage2"]["out"] / "history.csv").open() as file:
        first = next(csv.DictReader(file))
    ended = json.loads((at["stage1"]["out"] / "metrics.json").read_text())["stage1"]["val"]
    assert float(first["val_accuracy"]) == pytest.approx(ended["accuracy"], abs=1e-6)
    assert float(first["val_loss"]) == pytest.approx(ended["loss"], abs=1e-4)

    # ONNX answers as the final model does.
    final = classifier.load(at["evaluate"]["final"] / "model.safetensors")
    onnx.write(final, Graph(final), tmp_path / "m.onnx")
    images = np.asarray(read_images(at["prepare"]["out"], "test")[:4])
    found = onnx.Portable(tmp_path / "m.onnx").probabilities(images)
    np.testing.assert_allclose(found, final.probabilities(images), atol=1e-4)

    # A stage that is killed ends with the same bytes.
    ways = {**at["stage1"], "out": tmp_path / "again"}
    monkeypatch.setenv("PIPELINE_SAVE_SECONDS", "0")
    with monkeypatch.context() as patch:
        kill_at(patch, ResumeState, "save", 1)
        with pytest.raises(Killed):
            stage1(**ways, **arguments(stage1, params), resume=Resume(tmp_path / "state"))
    stage1(**ways, **arguments(stage1, params), resume=Resume(tmp_path / "state"))
    assert contents(tmp_path / "again") == contents(at["stage1"]["out"])
