"""What follows from a network's name: sizes, blocks to train, the layout of codes."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.advice.prior_results import Expected
from pipeline.advice.transferability import case_of, transferability
from pipeline.advise import paragraph
from pipeline.commands.networks import examined
from pipeline.inference.taps import pool
from pipeline.nets.automatic import STAGE_1_AT, STAGE_2_AT, input_size, top_blocks
from pipeline.nets.backbone import build, skeleton
from pipeline.nets.tokens import has_class_token, layout_of
from pipeline.stage_runtime.errors import ParamError
from pipeline.training.fit import Recipe, make_optimizer
from pipeline.training.freeze import everything, freeze_all_but

LITE0 = "timm/tf_efficientnet_lite0"


def test_of_the_default_network_auto_is_what_was_measured_best():
    assert input_size(skeleton(LITE0), "auto", 224) == 224
    assert input_size(skeleton(LITE0), "auto", 224, STAGE_1_AT) == 160
    assert input_size(skeleton(LITE0), "auto", 224, STAGE_2_AT) == 192
    assert top_blocks(skeleton(LITE0)) == ["blocks.4", "blocks.5", "blocks.6", "conv_head", "bn2"]


@pytest.mark.parametrize(
    ("name", "packed", "sizes"),
    [
        ("timm/tf_efficientnet_lite1", 256, (240, 160, 192)),  # made for 240
        ("timm/tf_efficientnet_lite2", 224, (224, 160, 192)),  # no more than there is
        ("timm/vit_small_patch14_reg4_dinov2", 224, (224, 154, 196)),  # made for 518
        ("timm/vit_small_patch16_224", 224, (224, 160, 192)),
        ("timm/eva02_tiny_patch14_224", 224, (224, 154, 196)),  # a multiple of its patches
        ("timm/beit_base_patch16_224", 224, (224, 224, 224)),  # takes one size
        ("torchvision/swin_t", 224, (224, 160, 192)),
    ],
)
def test_sizes_are_the_nearest_that_a_network_takes(name, packed, sizes):
    model = skeleton(name)
    shares = (1.0, STAGE_1_AT, STAGE_2_AT)
    assert tuple(input_size(model, "auto", packed, share) for share in shares) == sizes
    assert input_size(model, 96, packed) == 96  # as asked


def test_a_network_of_one_size_that_is_too_large_says_so():
    with pytest.raises(ParamError, match=r"takes images of 224 px, and the packed ones have 160;"):
        input_size(skeleton("torchvision/vit_b_16"), "auto", 160)


def test_of_a_transformer_the_upper_blocks_train():
    blocks = [f"blocks.{i}" for i in range(5, 12)]
    assert top_blocks(skeleton("timm/vit_small_patch16_224")) == [*blocks, "norm"]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 8, 5, 5), ("maps", 5, 0)),
        ((2, 5, 5, 8), ("maps_last", 5, 0)),
        ((2, 16, 8), ("tokens", 4, 0)),
        ((2, 17, 8), ("tokens", 4, 1)),
        ((2, 21, 8), ("tokens", 4, 5)),  # four registers
        ((2, 8, 1, 1), ("maps", 1, 0)),  # of a small image
        ((2, 2, 8), ("tokens", 1, 1)),
        ((2, 8), None),
    ],
)
def test_a_layout_follows_from_the_shape(shape, layout):
    assert layout_of(shape) == layout


def test_the_class_token_and_the_patches_are_pooled_apart():
    tokens = torch.randn(2, 21, 8)
    patches = tokens[:, 5:]
    parts = [tokens[:, 0], patches.mean(1), patches.amax(1)]
    torch.testing.assert_close(pool(tokens, "both", class_token=True), torch.cat(parts, 1))
    torch.testing.assert_close(pool(tokens, "max", class_token=False), parts[2])
    maps = torch.randn(2, 5, 5, 8)
    torch.testing.assert_close(pool(maps, "average"), maps.mean((1, 2)))
    assert has_class_token(build("timm/test_vit", 2))
    assert not has_class_token(build("timm/vit_base_patch16_siglip_224", 2))


def test_tokens_and_positions_have_no_weight_decay(recipe):
    model = build("timm/test_vit", 2)
    freeze_all_but(model, everything(model), "frozen")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, recipe).param_groups
    without = {names[p] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= without
    assert not any(
        isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Linear)
        for n in without
        if n.endswith("weight")
    )


@pytest.fixture
def recipe():
    return Recipe(1, 2, "adamw", 1e-3, 0.9, 0.01, 0.9, "cosine", 0.0, 1, 0.1, 0.0, 0.0)


def test_without_a_source_classifier_advice_does_not_say_how_alike_the_data_are():
    labels = np.array([0, 1, 0, 1])
    found = transferability(labels, np.arange(4), None, {"blocks.1": 0.7, "last": 0.8})
    assert case_of(found) is None
    said = paragraph(None, found, 0.8, Expected(0.01, -0.1, 0.1, 3))
    assert "the weights have no classifier" in said
    assert "confidence" not in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm/test_vit", ""),
        ("timm/test_vit_relpos", ""),  # takes one size, less than the usual one
        ("torchvision/regnet_y_400mf", ""),  # can't be built without numbers
        # Names 384 px, which isn't a multiple of its patches.
        pytest.param("timm/vit_so400m_patch14_siglip_384", "", marks=pytest.mark.long),
        pytest.param("torchvision/maxvit_t", "", marks=pytest.mark.long),
        ("timm/levit_128s", "2 heads"),
        ("timm/dpn48b", "no linear head"),
        ("torchvision/squeezenet1_0", "no linear head"),
    ],
)
def test_networks_are_examined_without_their_numbers(name, said):
    assert said in examined(name).refused
    assert bool(said) == bool(examined(name).refused)
