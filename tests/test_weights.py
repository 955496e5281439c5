"""Weight files as others publish them: their tensors to the bit, and what was done is said."""

import argparse
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.nets import backbone, weights
from pipeline.nets.torchvision_import import timm, torchvision
from pipeline.stage_runtime.errors import WeightsError

zoo = torchvision.models
ALL = zoo.list_models(module=zoo)
LARGE = 60e6  # parameters; of more, keys and shapes alone
# One of each family that torchvision reads in a way of its own, and one that it doesn't.
SHORT = ["resnet18", "densenet121", "googlenet", "mnasnet0_5", "squeezenet1_1"]
Tensors = dict[str, Tensor]


def published(name: str, like: nn.Module) -> Any:
    """Name a network's tensors as its published file does, from what torchvision's code reads.

    Those of before PyTorch 0.4.1 have no `num_batches_tracked`, DenseNets have old names, ViTs the
    MLPs of before torchvision 0.14; Inception and GoogLeNet keep their side heads.
    """
    state = like.state_dict()
    found: Any = OrderedDict()
    if name.startswith("mnasnet"):
        found._metadata = state._metadata  # it insists on a version
    for key, value in state.items():
        old = key
        if name.startswith("densenet"):
            old = re.sub(r"(?<=[.](?:norm|conv))(?=[12][.])", ".", key)
        if name.startswith("vit"):
            old = key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")
        if not key.endswith("num_batches_tracked") or name.startswith("mnasnet"):
            found[old] = value
    return found


def drawn(name: str) -> nn.Module:
    """Make the network that torchvision loads a published file into, with other values."""
    sides = {"aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    try:
        with torch.device("meta"):
            model: nn.Module = zoo.get_model(name, weights=None, **sides)
    except NotImplementedError:  # some compute with tensors how they are built
        model = zoo.get_model(name, weights=None, **sides)
    if sum(p.numel() for p in model.parameters()) > LARGE:
        return model.to("meta")
    model.to_empty(device="cpu")
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 251 / 251 + i)
    return model


@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in ALL]
)
def test_a_published_file_gives_the_networks_tensors_to_the_bit(name, tmp_path, monkeypatch):
    """The same as torchvision itself makes of the same file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    enum = next(iter(zoo.get_model_weights(name)))
    like = drawn(name)
    state = published(name, like)
    file = tmp_path / "hub" / "checkpoints" / Path(enum.url).name
    file.parent.mkdir(parents=True)
    head = "classifier.1" if name.startswith("squeezenet") else ""
    if next(iter(state.values())).is_meta:
        for key, value in state.items():
            state[key] = torch.zeros((), dtype=value.dtype).expand(value.shape)
        torch.save(state, file)
        model = drawn(name)
        [found] = weights.read(file)
        fitted = weights._fitted(model, backbone.head_name(model), found)
        assert isinstance(fitted, weights.State), fitted
        return
    torch.save(state, file, _use_new_zipfile_serialization=False)
    theirs = zoo.get_model(name, weights=enum).state_dict()
    if head:
        ours: nn.Module = zoo.get_model(name, weights=None)
        assert weights.load(ours, head, file, weights.read(file)) == []
    else:
        ours, _ = backbone.pretrained(f"torchvision/{name}", enum.name, "", seed=3)
    held = ours.state_dict()
    expected = {k: v for k, v in theirs.items() if not k.startswith(("aux", "Aux"))}
    if name == "maxvit_t":  # its head has no bias
        expected["classifier.5.bias"] = torch.zeros(1000)
    assert list(held) == list(expected)
    assert all(torch.equal(expected[key], held[key]) for key in held)


@pytest.mark.parametrize("name", backbone.OF_TENSORFLOW)
def test_the_normalisation_of_the_weights_from_tensorflow_is_torchvisions(name):
    """Theirs brings ImageNet's normalisation to it in the network."""
    enum = next(iter(zoo.get_model_weights(name)))
    theirs = zoo.get_model(name, weights=None, transform_input=True, init_weights=True)
    ours, facts = backbone.pretrained(f"torchvision/{name}", "none", "", seed=3)
    assert not ours.transform_input
    pixels = torch.rand(2, 3, 8, 8)

    def normalised(mean, std):
        mean, std = (torch.tensor(of)[:, None, None] for of in (mean, std))
        return (pixels - mean) / std

    wanted = theirs._transform_input(normalised(enum.transforms().mean, enum.transforms().std))
    assert torch.allclose(normalised(facts.mean, facts.std), wanted, atol=1e-6)


# Containers and wrappers


def tiny() -> Tensors:
    """Draw weights for the small network, with the head of its source."""
    torch.manual_seed(7)
    return backbone.build(TINY, backbone.SOURCE_CLASSES).state_dict()


def prefixed(prefix: str, state: Tensors | None = None) -> Tensors:
    return {prefix + k: v for k, v in (state or tiny()).items()}


def zip_file(found: Any, file: Path) -> None:
    torch.save(found, file)


def legacy(found: Any, file: Path) -> None:
    torch.save(found, file, _use_new_zipfile_serialization=False)


def others() -> Tensors:
    return {k: v + 1 for k, v in tiny().items()}


def lightning() -> dict[str, Any]:
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}}
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed("net."), "criterion.weight": torch.ones(5)},
        "optimizer_states": [optimizer],
        "hyper_parameters": {"lr": 1e-3},
    }


def averaged() -> dict[str, Any]:
    """A checkpoint of timm's training script."""
    return {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": others(),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1),
        "state_dict_ema": tiny(),
        "metric": np.float64(71.5),
    }


def momentum() -> dict[str, Any]:
    """MoCo's: a query and its momentum copy beside a queue."""
    both = {**prefixed("module.encoder_q."), **prefixed("module.encoder_k.", others())}
    return {"state_dict": {**both, "module.queue": torch.zeros(8, 4)}, "epoch": 9}


def with_numpy() -> dict[str, Any]:
    return {"model": {k: v.numpy() for k, v in tiny().items()}, "best": np.float32(0.5)}


def swa() -> Tensors:
    """torch.optim.swa_utils.AveragedModel's."""
    return {"n_averaged": torch.tensor(4), **prefixed("module.")}


def views() -> Tensors:
    """Tensors that share one memory, or lie in it otherwise than in order."""
    state = tiny()
    whole = torch.cat([v.float().flatten() for v in state.values()])
    found, first = {}, 0
    for k, v in state.items():
        found[k] = whole[first : first + v.numel()].reshape(v.shape).to(v.dtype)
        first += v.numel()
    return {
        k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in found.items()
    }


def half_body() -> Tensors:
    return {k: v.half() if v.is_floating_point() else v for k, v in tiny().items()}


FORMS: list[tuple[Callable[[], Any], str, list[str]]] = [
    (tiny, "w.pth", []),
    (tiny, "W.PTH", []),
    (tiny, "w.bin", []),
    (tiny, "w.pth.tar", []),
    (tiny, "pytorch_model.v2", []),
    (lambda: {"state_dict": tiny()}, "w.ckpt", ["taken from `state_dict`"]),
    (lambda: {"model": prefixed("module.")}, "w.pth", ["taken from `model`", "wrapping module"]),
    (lambda: [tiny(), 12], "w.pt", ["taken from `0`"]),
    (lambda: {"epoch": 3, "sub": {"net": tiny()}}, "w.pt", ["taken from `sub.net`"]),
    (lightning, "last.ckpt", ["taken from `state_dict`", "prefix `net.`, 1 tensors outside"]),
    (averaged, "model_best.pth.tar", ["`state_dict_ema` (there are also state_dict)"]),
    (momentum, "moco.pth", ["taken from `state_dict`", "module", "prefix `encoder_q.`"]),
    (with_numpy, "w.pkl", ["taken from `model`"]),
    (swa, "swa.pt", ["wrapping module", "1 tensors left out, not part of the network: n_averaged"]),
    (lambda: prefixed("_orig_mod."), "w.pt", ["without the wrapping _orig_mod"]),
    (lambda: prefixed("module._orig_mod."), "w.pt", ["wrapping _orig_mod, module"]),
    (lambda: prefixed("model.backbone."), "w.pt", ["without the prefix `model.backbone.`"]),
    (views, "w.pth", []),
    (half_body, "w.pth", ["stored as float16, computed in float32"]),
]


@pytest.mark.parametrize("write", [zip_file, legacy])
@pytest.mark.parametrize(("make", "name", "said"), FORMS)
def test_a_wrapped_file_gives_its_tensors_and_says_what_was_unwrapped(
    make, name, said, write, tmp_path
):
    file = tmp_path / name
    write(make(), file)
    told: list[str] = []
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    model, _ = backbone.pretrained(TINY, str(file), digest, 3, told.append)
    expected = half_body() if make is half_body else tiny()
    assert all(torch.equal(v, expected[k].to(v.dtype)) for k, v in model.state_dict().items())
    assert len(told) == len(said)
    for line, words in zip(told, said, strict=True):
        assert line.startswith("weights: ")
        assert words in line


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file(tiny(), tmp_path / "weights.bin")
    [state] = weights.read(tmp_path / "weights.bin")
    assert all(torch.equal(v, state.tensors[k]) for k, v in tiny().items())


@pytest.mark.parametrize(
    ("change", "n_classes", "said"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("classifier.")},
            1000,
            "no head",
        ),
        (
            lambda s: {
                **s,
                "classifier.weight": s["classifier.weight"][:7].clone(),
                "classifier.bias": s["classifier.bias"][:7].clone(),
            },
            7,
            "its head has 7 classes",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "classifier.bias"},
            1000,
            "its head has no bias: 0 is used",
        ),
    ],
)
def test_a_body_without_its_head_or_with_another_is_taken_and_said(
    change, n_classes, said, tmp_path
):
    file = tmp_path / "w.safetensors"
    save_file(change(tiny()), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    told: list[str] = []
    model, _ = backbone.pretrained(TINY, str(file), digest, 3, told.append)
    held, given = model.state_dict(), change(tiny())
    assert all(torch.equal(v, held[k]) for k, v in given.items())
    assert model.get_submodule("classifier").out_features == n_classes
    if "bias" in said:
        assert not held["classifier.bias"].any()
    assert len(told) == 1
    assert said in told[0]


def spoilt(name: str, value: float) -> Tensors:
    state = tiny()
    state[name].view(-1)[-1] = value
    return state


def scripted(file: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)


def whole_module(file: Path) -> None:
    torch.save(backbone.build(TINY, 10), file)


def without(prefix: str) -> Callable[[Path], None]:
    return lambda file: torch.save(
        {k: v for k, v in tiny().items() if not k.startswith(prefix)}, file
    )


def text(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda f: torch.save(spoilt("conv_stem.weight", np.nan), f),
        "conv_stem.weight holds 1 NaN or infinite values",
    ),
    (
        lambda f: torch.save({"model": spoilt("classifier.bias", np.inf)}, f),
        "classifier.bias holds 1 NaN or infinite values",
    ),
    (scripted, "is a TorchScript program; save its state_dict()"),
    (whole_module, "holds objects besides tensors (timm."),
    (without("conv_stem."), "1 tensors missing (such as conv_stem.weight)"),
    (without("classifier.w"), "an incomplete head (only classifier.bias)"),
    (text(b""), "is empty"),
    (text(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"), "a Git LFS pointer"),
    (text(b"\n<!DOCTYPE html><html>"), "a web page, not the weights"),
    (text(b"\x89HDF\r\n\x1a\n" + bytes(50)), "a Keras file (HDF5)"),
    (text(b"\x1f\x8b\x08" + bytes(50)), "compressed; unpack it"),
    (text(b"PK\x03\x04" + bytes(50)), "can't be read as weights"),
    (text(bytes(100)), "can't be read as weights"),
    (lambda f: torch.save({"epoch": 3}, f), "holds no named tensors"),
    (lambda f: torch.save(torch.zeros(3), f), "holds no named tensors"),
    (
        lambda f: torch.save({**tiny(), "blocks.0.7.conv.weight": torch.zeros(2)}, f),
        "1 tensors too many (such as blocks.0.7.conv.weight)",
    ),
    (
        lambda f: torch.save({**tiny(), "conv_stem.weight": torch.zeros(2, 3)}, f),
        "1 tensors of another shape (such as conv_stem.weight)",
    ),
    (lambda f: torch.save({k: v.int() for k, v in tiny().items()}, f), "is of type int32"),
]


@pytest.mark.parametrize(("write", "line"), REFUSED)
def test_what_is_no_weights_of_the_network_is_refused_in_one_line(write, line, tmp_path):
    file = tmp_path / "w.pth"
    write(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError) as raised:
        backbone.pretrained(TINY, str(file), digest, 3)
    said = str(raised.value)
    assert line in said
    assert str(file) in said
    assert said.isprintable()
    assert "\x1b" not in said
    assert len(said) < 300 + len(str(file))


def test_a_network_one_block_larger_is_not_taken_for_a_smaller_one(tmp_path):
    """All of ResNet-18's tensors are in ResNet-34's file, by name and shape."""
    file = tmp_path / "resnet34.pth"
    torch.save(zoo.get_model("resnet34", weights=None).state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=r"tensors too many \(such as layer1.2"):
        backbone.pretrained("torchvision/resnet18", str(file), digest, 0)


def test_a_folder_names_the_file_in_it(tmp_path):
    save_file(tiny(), tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"is a folder; name the file in it, such as .*model.safe"
    ):
        backbone.pretrained(TINY, str(tmp_path), "", 0)


def swin_with_masks(state):
    """Older versions stored the masks and the indices of the windows."""
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    return state


def dinov2_of_its_authors(state):
    """Registers by another name, a position of the class token, and a token for masked training."""
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, state["pos_embed"].shape[2])
    of_class = torch.full((1, 1, state["pos_embed"].shape[2]), 0.25)
    state["pos_embed"] = torch.cat([of_class, state["pos_embed"]], 1)
    return {k: v for k, v in state.items() if not k.startswith("head.")}


def eva_with_positions(state):
    """The rotary embedding's tables, which timm computes."""
    state["rope.freqs_cos"] = state["rope.freqs_sin"] = torch.zeros(256, 64)
    return state


def of_larger_images(state):
    """Position embeddings of 24 x 24 patches, which are interpolated to fewer."""
    state["pos_embed"] = torch.rand(1, 1 + 24 * 24, state["pos_embed"].shape[2])
    return state


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("timm/swin_tiny_patch4_window7_224", swin_with_masks),
        ("timm/vit_small_patch14_reg4_dinov2", dinov2_of_its_authors),
        ("timm/eva02_tiny_patch14_224", eva_with_positions),
        ("timm/deit_tiny_patch16_224", of_larger_images),
    ],
)
def test_a_transformers_published_file_gives_the_tensors_that_timm_makes_of_it(
    name, published, tmp_path
):
    file = tmp_path / "published.pth"
    model = backbone.build(name, 1000)
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) % 251 / 251 + i)
    torch.save(published(dict(model.state_dict())), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    said: list[str] = []
    ours, _ = backbone.pretrained(name, str(file), digest, 3, said.append)
    assert "weights: converted by timm's own code for this network" in said
    overlay = {"file": str(file), "num_classes": 1000}
    theirs = timm.create_model(
        name.partition("/")[2], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0
    ).state_dict()
    held = ours.state_dict()
    assert {k.partition(".")[0] for k in held if k not in theirs} == {"head"}
    assert all(torch.equal(held[key], tensor) for key, tensor in theirs.items())
