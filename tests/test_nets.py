import copy
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FORMATS, ROOT, TINY, needs_bf16
from PIL import Image
from torch import nn

from pipeline.commands.layers import as_table, layers
from pipeline.images.augment import dihedral
from pipeline.inference.taps import Taps, pool
from pipeline.nets.backbone import build, head_name, pretrained
from pipeline.nets.batches import EVAL_BATCH
from pipeline.nets.blocks import chain, depths, is_inside, match, trace, traced_size, trained_with
from pipeline.nets.convolve import ACTS, Shape, convolve, shape_of
from pipeline.nets.fuse import fuse, resolved
from pipeline.nets.network import Network
from pipeline.probing.codes import LAST, SOURCE
from pipeline.stage_runtime.cache_entries import hold
from pipeline.stage_runtime.errors import NetworkError, ParamError
from pipeline.training.cut import Cut, cut_below
from pipeline.training.fit import Recipe, fit, make_optimizer
from pipeline.training.freeze import everything, freeze_all_but
from pipeline.training.trunk_cache import cached_outputs, key_of

LITE0 = "timm/tf_efficientnet_lite0"
NETWORKS = [
    "timm/test_efficientnet",
    LITE0,
    "timm/test_resnet",  # adds its residuals in place
    "timm/test_nfnet",  # standardises the weights of its convolutions
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/densenet121",
    "torchvision/convnext_tiny",
]
RECIPE = Recipe(1, 8, "sgd", 0.1, 1.0, 0.01, 0.9, "constant", 0, 7, 0.1, 0.0, 0.0)


def drawn(name: str, n_classes: int = 3) -> nn.Module:
    """A network whose BatchNorm statistics and affine terms are far from their start."""
    torch.manual_seed(0)
    model = build(name, n_classes).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model


def images(n: int = 8, size: int = 64) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size).contiguous(memory_format=torch.channels_last)


def assert_folds_alike(name, size):
    model, x = drawn(name), images(size=size)
    with torch.no_grad():
        expected = model(x)
        actual = fuse(copy.deepcopy(model), "fp32")(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_fp32_network_gives_the_outputs_of_the_unfolded_one(name):
    assert_folds_alike(name, 64)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        *("cs3darknet_s", "darknet17", "selecsls42", "ese_vovnet19b_slim_dw", "hardcorenas_a"),
        *("mnasnet_050", "fbnetc_100", "rexnet_100", "lcnet_035", "tinynet_e", "mobilenetv2_050"),
        *("mobilenetv4_conv_small_035", "edgenext_xx_small", "inception_v3", "xception41"),
        *(
            "resnet18",
            "resnet18d",
            "legacy_seresnet18",
            "resnext26ts",
            "ecaresnet26t",
            "skresnet18",
        ),
        *("resnest14d", "gernet_s", "res2next50", "hrnet_w18_small", "regnety_002", "regnetz_005"),
        *("repghostnet_050", "ghostnetv2_100", "mobileone_s0", "fastvit_t8", "starnet_s1"),
        *("inception_next_atto", "tresnet_m", "tf_mixnet_s", "nf_resnet26", "convmixer_768_32"),
        *("gcresnet33ts", "hgnetv2_b0", "densenetblur121d", "resnetaa34d", "rdnet_tiny"),
    ],
)
def test_networks_of_many_families_fold_to_the_same_outputs(name):
    assert_folds_alike(f"timm/{name}", 96)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/maxvit_rmlp_pico_rw_256", 256),
        ("timm/coatnet_pico_rw_224", 224),
        ("torchvision/maxvit_t", 224),
    ],
)
def test_networks_that_normalise_first_fold_to_the_same_outputs(name, size):
    assert_folds_alike(name, size)


class Shared(nn.Module):
    """Tensors that two modules read, one of which could be fused."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv(x)
        y = self.bn(z)
        out = self.act(y)
        if self.read == "convolution":
            out = out + z
        elif self.read == "normalised":
            out = out + y
        elif self.read == "normalised twice":
            out = out + self.bn(out)
        elif self.read == "view":
            out = out + z.flatten(2).view_as(out)
        return self.head(out.mean((2, 3)))


@pytest.mark.parametrize(
    ("read", "fused"),
    [
        ("once", ["bn", "act"]),
        ("normalised", ["bn"]),
        ("convolution", []),
        ("normalised twice", []),
        ("view", []),
    ],
)
def test_only_what_nothing_else_reads_is_fused(read, fused):
    torch.manual_seed(0)
    model, x = Shared(read).eval(), images(2, 8)
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.bias.normal_()
        expected = model(x)
        actual = (folded := fuse(copy.deepcopy(model), "fp32"))(x)
        z = folded.conv(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        alone = model.conv(x)
        for name in fused:
            alone = model.get_submodule(name)(alone)
    torch.testing.assert_close(z, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "kernel_size": 3, "dilation": 2},
        {"padding": "valid", "kernel_size": (3, 2), "stride": 2},
        {"padding": (2, 1), "kernel_size": 3},
        {"padding": 1, "kernel_size": 3, "padding_mode": "reflect"},
    ],
)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("precision", FORMATS)
def test_convolutions_padded_in_any_way_fold_to_the_same_outputs(how, groups, precision):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, groups=groups, **how)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ).eval()
    model[3].running_mean.normal_(0, 0.1)
    x = images()
    with torch.no_grad():
        expected = model(x)
        actual = fuse(copy.deepcopy(model), precision)(x)
    tolerance = 1e-5 if precision == "fp32" else 0.02
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@needs_bf16
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_bf16_network_agrees_to_its_precision(name):
    model, x = drawn(name), images()
    with torch.no_grad():
        expected = model(x)
        actual = fuse(copy.deepcopy(model), "bf16")(x)
    assert actual.dtype == torch.float32
    assert nn.functional.cosine_similarity(actual, expected).min() > 0.99


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "torchvision/resnet18"])
def test_folding_keeps_the_gradients_of_weights_scales_and_shifts(name):
    plain, x = drawn(name).double(), images().double()
    folded = fuse(copy.deepcopy(plain).float(), "fp32")
    target = torch.arange(8) % 3
    nn.functional.cross_entropy(plain(x), target).backward()
    nn.functional.cross_entropy(folded(x.float()), target).backward()
    for (tensor, expected), actual in zip(
        plain.named_parameters(), folded.parameters(), strict=True
    ):
        scale = expected.grad.abs().max().clamp(min=1e-6)
        worst = (actual.grad - expected.grad).abs().max() / scale
        assert worst < 1e-3, tensor


def test_a_batchnorm_in_train_mode_is_not_folded_away():
    plain, x = drawn("torchvision/resnet18").train(), images()
    folded = fuse(copy.deepcopy(plain).eval(), "fp32").train()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(folded.bn1.running_mean, plain.bn1.running_mean)


def test_a_folded_network_answers_by_its_weights_after_a_step_of_a_fused_optimiser():
    plain, x = drawn("torchvision/resnet18"), images()
    folded = fuse(copy.deepcopy(plain), "fp32")
    freeze_all_but(folded, ["layer4", "fc"], "frozen")
    with torch.no_grad():
        folded(x)  # keeps what is folded, where that is kept
    optimizer = torch.optim.AdamW([p for p in folded.parameters() if p.requires_grad], fused=True)
    folded(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        plain.load_state_dict(folded.state_dict())
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)
        other = {name: t * 1.1 for name, t in plain.state_dict().items() if t.is_floating_point()}
        for model in (plain, folded):
            model.load_state_dict(other, strict=False)
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


def replaced_parameters(model, tensors):
    for name, tensor in tensors.items():
        of, _, last = name.rpartition(".")
        if isinstance(getattr(model.get_submodule(of), last), nn.Parameter):
            setattr(model.get_submodule(of), last, nn.Parameter(tensor, requires_grad=False))


def replaced_buffers(model, tensors):
    for name, buffer in list(model.named_buffers()):
        of, _, last = name.rpartition(".")
        if name in tensors and buffer.is_floating_point():
            setattr(model.get_submodule(of), last, tensors[name])


def replaced_data(model, tensors):
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]


@pytest.mark.parametrize("replace_in", [replaced_parameters, replaced_buffers, replaced_data])
def test_a_folded_network_answers_by_tensors_that_replace_others_of_their_version(replace_in):
    torch.manual_seed(0)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pooled).eval()
    folded, x = fuse(copy.deepcopy(plain.requires_grad_(False)), "fp32"), images()
    for factor in (1.0, 1.1, 1.2):
        state = {k: t * factor for k, t in plain.state_dict().items() if t.is_floating_point()}
        for model in (plain, folded):
            replace_in(model, {name: tensor.clone() for name, tensor in state.items()})
        with torch.no_grad():
            torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


REFUSED = "mkldnn_convolution: bf16 path needs the cpu support avx_ne_convert or avx512bw"


def test_a_number_format_that_the_processor_refuses_is_named_and_not_the_network(monkeypatch):
    def refusing(x, *more):
        if x.dtype == torch.bfloat16:
            raise RuntimeError(REFUSED)  # as with ONEDNN_MAX_CPU_ISA=AVX2
        return convolve(x, *more)

    monkeypatch.setattr("pipeline.nets.fuse.convolve", refusing)
    model = fuse(drawn(LITE0), "bf16")
    line = re.escape(f"params.yaml: precision: bf16 fails on this machine ({REFUSED}); set precisi")
    with pytest.raises(ParamError, match=line):
        trace(model)
    with pytest.raises(ParamError, match=line):
        model(images())  # with gradients
    assert trace(fuse(drawn(LITE0), "fp32"))


class Failing(nn.Module):
    """A network that takes images of some sizes, and fails at others."""

    def __init__(self, sizes, error):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 2)
        self.sizes, self.error = sizes, error

    def forward(self, x):
        if x.shape[-1] not in self.sizes:
            raise self.error
        return self.head(self.layer(x).mean((2, 3)))


def test_a_network_that_runs_at_another_size_is_told_to_fail_by_its_size():
    model = Failing([384], RuntimeError("shape '[2, 3]' is\ninvalid"))
    said = r"can't take images of 100 px \(shape '\[2, 3\]' is invalid\); 384 px works"
    with pytest.raises(ParamError, match=said):
        trace(model, 100)
    assert traced_size(model) == 384
    assert [call.name for call in trace(model)] == ["layer", "head"]


def test_a_network_takes_another_size_or_says_that_it_can_t():
    model = Failing([64, 224], RuntimeError("kernels of 5"))
    network = Network(model, None, ["a", "b"], 224, 224, "crop", 3, "fp32")
    network.take(64)
    assert network.image_size == 64
    with pytest.raises(ParamError, match=r"can't take images of 32 px \(kernels of 5\); 224 px"):
        network.take(32)
    assert network.image_size == 64


@pytest.mark.parametrize("kind", [RuntimeError, IndexError, TypeError])
def test_a_network_that_fails_at_every_size_names_what_failed(kind):
    cause = kind("no kernel\n" + 200 * "x")
    line = (
        rf"Failing fails in its forward pass at .* \({kind.__name__}: no kernel x+\); "
        "set PIPELINE_DEBUG=1"
    )
    with pytest.raises(NetworkError, match=line) as caught:
        trace(Failing([], cause))
    assert len(str(caught.value)) < 250
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_a_network_that_runs_out_of_memory_is_not_blamed_for_it(kind):
    model = Failing([], kind("no more"))
    for look in (trace, chain, lambda model: Cut(model, "layer").is_chain()):
        with pytest.raises(kind):
            look(model)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pads", [(0, 0), (1, 1), (0, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("depthwise", [True, False])
def test_a_convolutions_gradients_are_those_of_autograd(kernel, stride, pads, depthwise):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 13, 14, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1 if depthwise else 4, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    shape = Shape((stride, stride), (pads[0],) * 2, (pads[1],) * 2, (1, 1), 4 if depthwise else 1)
    padded = nn.functional.pad(x, pads * 2)
    plain = nn.functional.conv2d(padded, weight, bias, stride, groups=shape.groups)
    direction = torch.randn_like(plain)
    expected = torch.autograd.grad((plain.clamp(0, 6) * direction).sum(), (x, weight, bias))
    low = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    y = convolve(low[0].contiguous(memory_format=torch.channels_last), *low[1:], shape, "relu6")
    actual = torch.autograd.grad((y * direction).sum(), low)
    torch.testing.assert_close(y.double(), plain.clamp(0, 6), rtol=1e-4, atol=1e-4)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (7, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_kernel_may_be_larger_than_the_map(size, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    plain = nn.functional.conv2d(x, weight, None, stride, 3, groups=4)
    expected = torch.autograd.grad(plain.sum(), (x, weight))
    low = [t.detach().float().requires_grad_() for t in (x, weight)]
    y = convolve(*low, None, Shape((stride, stride), (3, 3), (3, 3), (1, 1), 4), "none")
    for one, other in zip(torch.autograd.grad(y.sum(), low), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Identity()])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_convolution_and_activation_at_once_are_the_two_to_the_bit(act, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16).to(dtype)
    x = (torch.randn(8, 16, 20, 20) * 4).to(dtype).contiguous(memory_format=torch.channels_last)
    shape = shape_of(conv, (20, 20))
    with torch.no_grad():
        expected = act(conv(x))
        actual = convolve(x, conv.weight, conv.bias, shape, ACTS.get(type(act), "none"))
    assert torch.equal(actual, expected)


def test_the_chain_of_a_network_ends_in_its_head():
    assert chain(build("torchvision/resnet18", 3)) == [
        *("conv1", "bn1", "relu", "maxpool"),
        *("layer1", "layer2", "layer3", "layer4"),
        *("avgpool", "fc"),
    ]
    assert chain(build(LITE0, 3)) == [
        *("conv_stem", "bn1"),
        *(f"blocks.{i}" for i in range(7)),
        *("conv_head", "bn2", "global_pool", "classifier"),
    ]


def test_depths_are_blocks_of_convolutions_from_early_to_late():
    assert depths(build("torchvision/resnet18", 3)) == ["layer1", "layer2", "layer3", "layer4"]
    # Without blocks.0, whose maps have half the side.
    assert depths(build(LITE0, 3)) == [f"blocks.{i}" for i in range(1, 7)]
    assert len(depths(build("torchvision/vgg11", 3))) <= 8


@pytest.mark.parametrize("name", NETWORKS)
def test_trunk_and_top_give_the_whole_network_to_the_bit(name):
    model = fuse(drawn(name), resolved("auto"))
    x = images()
    with torch.no_grad():
        expected = model(x)
        for block in (depths(model)[-1], head_name(model)):
            cut = cut_below(copy.deepcopy(model), [block])
            assert torch.equal(cut.top(cut.trunk(x)), expected)


def test_the_cut_lies_before_the_block_that_encloses_the_lowest_unfrozen_module():
    assert cut_below(build("torchvision/resnet18", 3), ["layer4.1.conv2", "fc"]).name == "layer4"
    assert cut_below(build("torchvision/resnet18", 3), ["fc"]).name == "fc"


def test_a_network_that_is_no_chain_at_the_block_is_cut_further_down():
    class Forked(nn.Module):
        """Its `middle` takes the stem's output, and its head that of both."""

        def __init__(self):
            super().__init__()
            self.stem, self.middle = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.late, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            stem = self.stem(x)
            return self.head((self.late(self.middle(stem)) + stem).mean((2, 3)))

    model, x = Forked().eval(), images()
    cut = cut_below(model, ["late"])
    assert cut.name == "middle"
    with torch.no_grad():
        assert torch.equal(cut.top(cut.trunk(x)), model(x))


def test_patterns_select_modules_and_not_those_inside_them():
    model = build("torchvision/resnet18", 3)
    assert match(model, ["layer[34]", "layer4.0"], "stage1.unfreeze") == ["layer3", "layer4"]
    assert match(model, [], "stage1.unfreeze") == []


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_training_changes_the_trained_tensors_and_no_other_bit(batchnorm):
    torch.manual_seed(0)
    model = fuse(drawn("torchvision/resnet18"), "fp32")
    trained = trained_with(model, ["layer4"])
    trainable = freeze_all_but(model, trained, batchnorm)
    cut = cut_below(model, trained)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, labels = images(16), np.arange(16) % 3
    with torch.no_grad():
        z = cut.trunk(x)
    for _ in fit(model, cut.top, lambda _, rows: z[rows], labels, np.ones(16), RECIPE, seed=0):
        pass
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {
        k for k in before if is_inside(k, "layer4") and ("running" in k or "num_batches" in k)
    }
    assert moved == set(trainable) | (statistics if batchnorm == "train" else set())


def test_frozen_batchnorm_and_dropout_stay_in_eval_through_model_train():
    model = build("torchvision/mobilenet_v3_small", 3)
    freeze_all_but(model, ["features.12", "classifier.3"], "train")
    model.train()
    training = {n for n, m in model.named_modules() if m.training and not list(m.children())}
    assert training == {"features.12.0", "features.12.1", "features.12.2", "classifier.3"}


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_a_later_call_frees_what_it_does_not_freeze(batchnorm):
    model = build("torchvision/mobilenet_v3_small", 3)
    freeze_all_but(model, ["features.12", "classifier.3"], "frozen")
    trainable = freeze_all_but(model, everything(model), batchnorm)
    assert [name for name, _ in model.named_parameters()] == trainable
    model.train()
    still = {type(m) for m in model.modules() if not m.training}
    assert still == ({nn.BatchNorm2d} if batchnorm == "frozen" else set())


class Tokens(nn.Module):
    """A network with tensors of its own, in no module."""

    def __init__(self):
        super().__init__()
        self.class_token, self.position = (nn.Parameter(torch.ones(1, 4, 1)) for _ in range(2))
        self.stem, self.head = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 2)

    def forward(self, x):
        patches = self.stem(x).flatten(2) + self.position
        return self.head(torch.cat([self.class_token.expand(len(x), 4, 1), patches], 2).mean(2))


def test_everything_names_the_tensors_that_lie_in_no_module():
    model = Tokens().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainable = freeze_all_but(model, everything(model), "train")
    assert list(before) == trainable
    cut = cut_below(model, everything(model))
    assert cut.name == "stem"
    recipe, x, labels = replace(RECIPE, layer_decay=0.5), images(16), np.arange(16) % 2
    groups = make_optimizer(model, recipe).param_groups
    assert sum(len(group["params"]) for group in groups) == len(before)
    for _ in fit(model, model, lambda _, rows: x[rows], labels, np.ones(16), recipe, seed=0):
        pass
    assert [n for n, t in model.state_dict().items() if torch.equal(t, before[n])] == []


def test_the_optimiser_holds_exactly_the_trainable_set():
    model = build("torchvision/resnet18", 3)
    trainable = freeze_all_but(model, ["layer4", "fc"], "frozen")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, RECIPE).param_groups
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(trainable)


def test_rates_fall_by_block_and_small_tensors_do_not_decay():
    model = build("torchvision/resnet18", 3)
    freeze_all_but(model, ["layer4", "fc"], "frozen")
    recipe = Recipe(1, 8, "adamw", 1.0, 0.5, 0.01, 0.9, "constant", 0, 7, 0.1, 0.0, 0.0)
    found = {
        (group["lr"], group["weight_decay"]) for group in make_optimizer(model, recipe).param_groups
    }
    assert found == {(1.0, 0.01), (1.0, 0.0), (0.5, 0.01), (0.5, 0.0)}  # fc; layer4, one below


LITE0_BLOCKS = [f"blocks.{i}" for i in range(7)]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("torchvision/resnet18", ["conv1 bn1", "layer1", "layer2", "layer3", "layer4", "fc"]),
        (LITE0, ["conv_stem bn1", *LITE0_BLOCKS, "conv_head bn2", "classifier"]),
        (
            "torchvision/densenet121",
            [
                "features.conv0 features.norm0",
                *(
                    f"features.{part}{i}"
                    for i in (1, 2, 3)
                    for part in ("denseblock", "transition")
                ),
                "features.denseblock4 features.norm5",
                "classifier",
            ],
        ),
        ("torchvision/convnext_tiny", [*(f"features.{i}" for i in range(8)), "classifier"]),
    ],
)
def test_rates_fall_once_a_block_that_has_weights(name, blocks):
    """By hand: 1 at the head, .9 one block below it, .9 ** 2 two below, ..."""
    model = build(name, 3)
    recipe = replace(RECIPE, lr=1.0, layer_decay=0.9)
    groups = make_optimizer(model, recipe).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for below, modules in enumerate(reversed(blocks)):
        for module in modules.split():
            found = {rates[id(p)] for p in model.get_submodule(module).parameters()}
            assert list(found) == pytest.approx([0.9**below]), module


def test_codes_are_the_mean_over_the_map_and_the_heads_input():
    model, x = drawn("torchvision/resnet18"), images()
    with torch.no_grad(), Taps(model, ["layer4", LAST, SOURCE], "average") as taps:
        pooled, last, source = taps(x)
        torch.testing.assert_close(pooled, last)  # resnet's head takes layer4's mean
        torch.testing.assert_close(model.fc(last), model(x))
        assert torch.equal(source, model(x))


def test_codes_hold_average_and_maximum_of_each_map():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[-4.0, 0.0], [0.0, 0.0]]]])
    assert pool(maps, "average").tolist() == [[3.0, -1.0]]
    assert pool(maps, "max").tolist() == [[6.0, 0.0]]
    assert pool(maps, "both").tolist() == [[3.0, -1.0, 6.0, 0.0]]


@pytest.mark.parametrize(
    "shape", [(4, 16, 112, 112), (3, 40, 13, 29), (2, 320, 7, 7), (2, 5, 1, 1)]
)
def test_averages_of_low_precision_maps_are_those_in_double_precision(shape):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(shape, generator=generator).mul_(6).to(torch.bfloat16)
    maps = maps.contiguous(memory_format=torch.channels_last)
    found = pool(maps, "average")
    assert found.dtype == torch.float32
    # Each row's average is rounded once, by half of the last of bfloat16's eight digits.
    torch.testing.assert_close(found.double(), maps.double().mean((2, 3)), rtol=2**-9, atol=0)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)), ((0.5,) * 3, (0.2,) * 3), ((0.5,) * 3, (0.1, 0.2, 0.3))],
)
def test_pixels_are_normalised_by_the_weights_mean_and_deviation(precision, channels, mean, std):
    model, backbone = pretrained(LITE0, "none", "", 0)
    backbone = replace(backbone, mean=mean, std=std)
    facts = (backbone, ["a"], 32, 32, "squash", channels, precision)
    network = Network(fuse(model.eval(), precision), *facts)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, channels), np.uint8)
    packed = torch.from_numpy(pixels if channels == 3 else pixels[..., 0])
    found = network.normalise(packed)
    expected = (pixels / 255 - backbone.mean) / backbone.std
    assert found.shape == (2, 3, 32, 32)
    tolerance = 2**-8 if precision == "bf16" else 1e-5
    np.testing.assert_allclose(
        found.float().permute(0, 2, 3, 1).numpy(), expected, rtol=tolerance, atol=1e-5
    )
    # The first convolution would round the input itself: so rounded before, nothing changes.
    network.precision = "fp32"
    with torch.no_grad():
        assert torch.equal(network.model(found), network.model(network.normalise(packed)))


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_and_turns_may_come_before_shrinking_or_after(channels):
    model, backbone = pretrained(TINY, "none", "", 0)
    network = Network(fuse(model, "fp32"), backbone, ["a"], 32, 50, "squash", channels, "fp32")
    shape = (2, 50, 50) if channels == 1 else (2, 50, 50, 3)
    pixels = torch.randint(
        256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    smaller = network.shrink(pixels)
    assert smaller.shape == (2, 32, 32, *shape[3:])
    for kind in range(8):
        turned = network.normalise(dihedral(pixels, kind))
        torch.testing.assert_close(network.normalise(dihedral(smaller, kind)), turned)
        torch.testing.assert_close(dihedral(network.normalise(pixels), kind, rows=2), turned)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("timm/resnet18.tv_in1k", Image.Resampling.BILINEAR),
        ("timm/resnet18.a1_in1k", Image.Resampling.BICUBIC),
    ],
)
def test_images_are_resized_as_the_weights_own_configuration_says(name, how):
    """Pillow is the reference: it rounds to whole levels in between."""
    model, backbone = pretrained(name, "none", "", 0)
    network = Network(model, backbone, ["a"], 40, 64, "squash", 3, "fp32")
    pixels = np.random.default_rng(0).integers(60, 190, (64, 64, 3), np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((40, 40), how), np.float32)
    found = network.shrink(torch.from_numpy(pixels)[None])[0].numpy()
    assert np.abs(found - expected).max() < 1.5
    other = network.shrink(torch.from_numpy(255 - pixels)[None])[0].numpy()
    np.testing.assert_allclose(255 - other, found, atol=1e-2)


def test_an_image_gives_the_same_bits_at_any_place_of_a_batch():
    model, _ = pretrained(LITE0, "imagenet", "", 0)
    model = fuse(model.eval(), resolved("auto"))
    x, order = images(EVAL_BATCH), torch.randperm(EVAL_BATCH)
    with torch.no_grad():
        assert torch.equal(model(x)[order], model(x[order]))


def numbered(asked):
    """A function of (view, row) that notes for which views it was asked."""

    def compute(views, rows):
        asked.extend(views)
        numbers = [torch.from_numpy(rows * 10 + view).float() for view in views]
        return [of.view(-1, 1, 1, 1).expand(-1, 2, 3, 3) for of in numbers]

    return compute


def test_stored_outputs_are_the_computed_ones_in_every_epoch(tmp_path, monkeypatch):
    compute = numbered([])
    kept = cached_outputs(compute, 45, 2, "key", "test")
    assert len(list((tmp_path / "cache" / "trunk" / "key").glob("*.npy"))) == 2
    monkeypatch.setenv("PIPELINE_CACHE_GB", "0")
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "none"))
    anew = cached_outputs(compute, 45, 2, "key", "test")
    rows = np.array([44, 0, 31, 32])
    for epoch, view in ((1, 1), (2, 2), (3, 1)):
        assert torch.equal(kept(epoch, rows), compute([view], rows)[0])
        assert torch.equal(anew(epoch, rows), compute([view], rows)[0])
    assert not (tmp_path / "none").exists()


def test_a_later_run_computes_only_the_views_that_are_not_there(tmp_path):
    asked = []
    cached_outputs(numbered([]), 45, 2, "key", "test")
    (tmp_path / "cache" / "trunk" / "key" / "2.npy").write_bytes(b"cut off")
    kept = cached_outputs(numbered(asked), 45, 3, "key", "test")
    assert asked[1:] == [2, 3, 2, 3]  # the first is a look at the shape
    assert kept(3, np.array([7])).unique().item() == 73
    asked.clear()
    cached_outputs(numbered(asked), 45, 3, "other", "test")
    assert asked[1:] == [1, 2, 3, 1, 2, 3]


def test_the_cache_keeps_to_its_size_by_what_was_used_last(tmp_path, monkeypatch):
    on_disk = 16_384  # an array of 3,368 bytes, a progress file, both in blocks
    monkeypatch.setenv("PIPELINE_CACHE_GB", str(1.5 * on_disk / 1e9))
    folder = tmp_path / "cache" / "trunk"
    for name, used in (("running", 0), ("old", 1), ("new", 2)):
        cached_outputs(numbered([]), 45, 1, name, "test")
        os.utime(folder / name, (used, used))
    with hold(folder / "running", "test"):
        os.utime(folder / "running", (0, 0))
        cached_outputs(numbered([]), 45, 1, "third", "test")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"running", "new", "third"}


def test_outputs_stay_readable_when_another_run_deletes_the_files(tmp_path, monkeypatch):
    compute = numbered([])
    kept = cached_outputs(compute, 45, 1, "key", "test")
    monkeypatch.setenv("PIPELINE_CACHE_GB", "0.000006")
    cached_outputs(compute, 45, 1, "other", "test")
    assert not (tmp_path / "cache" / "trunk" / "key").exists()
    rows = np.arange(45)
    assert torch.equal(kept(1, rows), compute([1], rows)[0])


def test_the_key_tells_apart_whatever_changes_the_trunks_outputs():
    model, backbone = pretrained(TINY, "none", "", 0)
    network = Network(fuse(model, "fp32"), backbone, ["a"], 64, 64, "squash", 3, "fp32")
    pixels = "hash"
    keys = {key_of(network, "blocks.1", pixels, seed=0)}
    keys |= {key_of(network, "blocks.1", pixels, seed=1)}
    keys |= {key_of(network, "blocks.2", pixels, seed=0)}
    keys |= {key_of(network, "blocks.1", "other", seed=0)}
    keys |= {key_of(replace(network, image_size=32), "blocks.1", pixels, seed=0)}
    other = replace(network, backbone=replace(backbone, sha256="other"))
    keys |= {key_of(other, "blocks.1", pixels, seed=0)}
    assert len(keys) == 6
    renamed = replace(network, classes=["b"])  # no trunk depends on the classes
    assert key_of(renamed, "blocks.1", pixels, seed=0) in keys


def test_packaged_weights_are_pinned_with_their_own_normalisation():
    model, backbone = pretrained(LITE0, "imagenet", "", 0)
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    assert backbone.sha256.startswith("57934424")  # as the file's name says
    assert model.get_submodule(head_name(model)).out_features == 1000


@pytest.mark.parametrize("all_modules", [False, True])
def test_the_listed_layers_can_be_named_and_their_compute_is_that_of_the_convolutions(all_modules):
    model = build("torchvision/resnet18", 1000)
    found = layers(model, 64, all_modules)
    assert match(model, [layer.name for layer in found], "stage1.unfreeze")
    blocks = [layer for layer in found if layer.name in chain(model)]
    assert sum(layer.parameters for layer in blocks) == sum(p.numel() for p in model.parameters())
    assert sum(layer.share for layer in blocks) == pytest.approx(1)
    # By hand: outputs x input channels x kernel, for the first convolution against all of them.
    done = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):

            def count(m, _, out, name=name):
                done[name] = out[0].numel() * m.in_channels * m.kernel_size[0] * m.kernel_size[1]

            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 64, 64))
    total = sum(done.values()) + 512 * 1000
    by_name = {layer.name: layer for layer in found}
    assert by_name["conv1"].share == pytest.approx(done["conv1"] / total)
    assert by_name["layer4"].share == pytest.approx(
        sum(n for name, n in done.items() if name.startswith("layer4")) / total
    )
    assert [layer.name for layer in blocks if layer.is_depth] == depths(model)


def test_the_table_of_layers_says_what_training_from_each_on_would_repeat():
    lines = as_table(layers(build("timm/tf_efficientnet_lite0", 1000), 224), "classifier")
    rows = {line.split()[0]: line for line in lines}
    assert "  36.8%  depth" in rows["blocks.5"]
    assert "100.0%" in rows["conv_stem"]
    assert rows["classifier"].endswith("head, always trains")


LOADED = """
import torch

loaded = []

def load_library(path):
    for name in ("nms", "qnms") if not loaded else ():  # a second time does nothing
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    loaded.append(path)

torch.ops.load_library = load_library
from pipeline.nets import torchvision_import as vision

vision._declare_ops()
torch.ops.load_library("as torchvision does at its import")
assert [path.rpartition("/")[2].partition(".")[0] for path in loaded[:-1]] == ["_C"], loaded
"""


def test_compiled_ops_of_torchvision_that_load_are_not_declared_again():
    """As beside PyTorch's build for CUDA; beside the one for processors alone they don't load."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
