"""Read published weight files: any container and wrapper, old names, with or without a head.

Remarks tell the user what was unwrapped, left out or converted.
"""

import argparse
import copy
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.nets import checkpoint
from pipeline.nets.torchvision_import import torchvision
from pipeline.stage_runtime.errors import WeightsError, one_line

# Other kinds of files that may have a weight file's name, by their first bytes, and what to do.
NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights; run `git lfs pull` there",
    b"<": "a web page, not the weights; fetch the file itself",
    b"\x89HDF": "a Keras file (HDF5); convert it to a PyTorch state_dict",
    b"GGUF": "a GGUF file; choose weights for PyTorch",
    b"\x1f\x8b": "compressed; unpack it",
    b"BZh": "compressed; unpack it",
    b"\xfd7zXZ": "compressed; unpack it",
}
# Harmless classes that training scripts save next to the tensors (options and metrics), by their
# names in numpy 1 and 2.
_ARRAYS: Any = np._core.multiarray  # type: ignore[attr-defined]
SAFE: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
SAFE += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
SAFE += [
    (function, f"numpy.{core}.multiarray.{function.__name__}")
    for function in (_ARRAYS.scalar, _ARRAYS._reconstruct)
    for core in ("core", "_core")
]
# Entries that hold a network, in order of preference: averaged weights before the last step's.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("backbone", "encoder", "params", "weights", "student"),
)
# Layers that wrap a module in another one: data parallel, compiled, sharded, recomputed.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
NO_HEAD = "no head in the file: a random one is used, whose outputs have no meaning"
DEEPEST = 4  # levels of nested wrappers that are searched


@dataclass
class State:
    """The tensors of one entry of a file, by name."""

    where: str  # the keys to it, joined by dots; empty for the file itself
    tensors: dict[str, Tensor]
    remarks: list[str] = field(default_factory=list)


def read(file: Path) -> list[State]:
    """Read the candidates for a network's tensors from a file, without executing anything in it.

    A file may wrap several candidates; the most likely one comes first. For a final model, it is
    the network, without the probe.

    Raises WeightsError if the file isn't a weight file.
    """
    found = _contents(file)
    states = sorted(_states(found), key=_rank)
    if not states:
        raise WeightsError(f"{file}: holds no named tensors; save the model's state_dict()")
    for state in states:
        if network := checkpoint.strip_prefix(state.tensors, "network."):
            state.tensors = network
    return states


def load(model: nn.Module, head: str, file: Path, states: list[State]) -> list[str]:
    """Load the first of `states` that fits the network; return remarks for the user.

    `head` names the head, which may have other classes than the model's, or be missing.

    Raises WeightsError if no state fits, or if tensors hold NaN or infinite values.
    """
    misfits = []
    for state in states:
        fitted = _fitted(model, head, state)
        if isinstance(fitted, State):
            _refuse_no_numbers(file, fitted)
            others = [other.where for other in states if other is not state]
            if state.where:
                beside = f" (there are also {', '.join(others)})" if others else ""
                fitted.remarks.insert(0, f"taken from `{state.where}`{beside}")
            n_classes = len(fitted.tensors[f"{head}.weight"])
            if n_classes != len(model.get_parameter(f"{head}.weight")):
                resize_head(model, head, n_classes)
            model.load_state_dict(fitted.tensors)
            return fitted.remarks
        misfits.append(fitted)
    raise WeightsError(f"{file}: not weights of this network: {misfits[0]}; choose another file")


def resize_head(model: nn.Module, head: str, n_classes: int) -> None:
    """Replace the linear layer called `head` with a new one of `n_classes`, with a bias."""
    old = model.get_submodule(head)
    assert isinstance(old, nn.Linear)
    model.set_submodule(head, nn.Linear(old.in_features, n_classes))


def _contents(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with file.open("rb") as opened:
        start = opened.read(32)
    if not start:
        raise WeightsError(f"{file}: is empty; fetch it again")
    for magic, said in NOT_WEIGHTS.items():
        if start.lstrip().startswith(magic):
            raise WeightsError(f"{file}: is {said}")
    try:
        # By content: eight bytes of length, then JSON.
        if start[8:9] == b"{" or file.suffix.lower() == ".safetensors":
            return load_file(file)
        if _is_torchscript(file):
            raise WeightsError(f"{file}: is a TorchScript program; save its state_dict()")
        with torch.serialization.safe_globals(SAFE):
            return torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        said = one_line(error, 120)
        raise WeightsError(f"{file}: can't be read as weights ({said}); fetch it again") from None
    except WeightsError:
        raise
    except Exception as error:  # unpickling refused, a truncated file, a wrong format
        raise WeightsError(f"{file}: {_why(file, error)}") from None


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _why(file: Path, error: Exception) -> str:
    """Return in one line why torch can't read a file; its own message has paragraphs."""
    try:
        with torch.serialization.safe_globals(SAFE):
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the file has no readable pickle
        objects = []
    # There is no list for legacy files, but the message names the refused object.
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    names = sorted({*objects, *([refused[1]] if refused else [])})
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return (
            f"holds objects besides tensors ({shown}), which are never executed; "
            "save the model's state_dict()"
        )
    return f"can't be read as weights ({type(error).__name__}); it is damaged, or no weight file"


def _states(found: Any, where: tuple[str, ...] = ()) -> Iterator[State]:
    """Yield the dictionaries that hold mostly tensors, also inside wrappers."""
    if isinstance(found, list | tuple) and not where:  # (state_dict, epoch)
        found = {str(i): value for i, value in enumerate(found)}
    if not isinstance(found, Mapping):
        return
    tensors = {
        k: torch.from_numpy(v) if isinstance(v, np.ndarray) and v.dtype.kind in "fiu" else v
        for k, v in found.items()
        if isinstance(k, str) and isinstance(v, Tensor | np.ndarray)
    }
    if len(tensors) > len(found) / 2:
        yield State(".".join(where), {k: v for k, v in tensors.items() if isinstance(v, Tensor)})
    elif len(where) < DEEPEST:
        for key, value in found.items():
            if isinstance(key, str):  # an optimiser's keys are numbers
                yield from _states(value, (*where, key))


def _rank(state: State) -> tuple[int, int]:
    """Return a sort key, the most likely network first: by its wrapper's name, then by size."""
    names = state.where.split(".")
    ranks = [WRAPPERS.index(name) for name in names if name in WRAPPERS]
    return (min(ranks) if ranks else len(WRAPPERS), -len(state.tensors))


def _fitted(model: nn.Module, head: str, state: State) -> State | str:
    """Convert tensors to the network's names and shapes, or return why they don't fit."""
    own = model.state_dict()
    tensors, remarks = _renamed(state.tensors, own)
    of_head = {k: own[k] for k in (f"{head}.weight", f"{head}.bias")}
    body = {k: v for k, v in own.items() if k not in of_head}
    if not _alike(body, tensors) or tensors.keys() - own.keys():
        given, tensors = tensors, _filtered(model, tensors)
        if {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in tensors.items()}:
            remarks.append("converted by timm's own code for this network")
    wrong, left = _against_body(model, head, body, tensors)
    if wrong:
        return wrong
    if left:
        parts = sorted({k.partition(".")[0] for k in left})
        remarks.append(f"{len(left)} tensors left out, not part of the network: {', '.join(parts)}")
    tensors = {k: v for k, v in tensors.items() if k not in left}
    if said := _head_of(tensors, of_head):
        return said
    for k, tensor in tensors.items():
        if k in own and tensor.is_floating_point() != own[k].is_floating_point():
            return f"{k} is of type {str(tensor.dtype).removeprefix('torch.')}"
    remarks += _complete_head(tensors, of_head)
    types = {str(v.dtype).removeprefix("torch.") for v in tensors.values() if v.is_floating_point()}
    if odd := sorted(types - {"float32"}):
        remarks.append(f"stored as {', '.join(odd)}, computed in float32")
    return State(state.where, {**of_head, **tensors}, remarks)


def _against_body(
    model: nn.Module, head: str, body: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> tuple[str, list[str]]:
    """Compare tensors with a network without its head.

    Returns why they don't fit (empty if they do), and the names of the tensors that are not part of
    the network.
    """
    ours = (f"{head}.weight", f"{head}.bias")
    of_body = {k: v for k, v in tensors.items() if k not in ours}
    shaped = [k for k, v in body.items() if k in tensors and tensors[k].shape != v.shape]
    missing: list[str] = []
    left = [k for k in of_body if k not in body]
    if not shaped and not _alike(body, tensors):
        missing, left = _by_torch(model, of_body)
        missing = [k for k in missing if k not in ours]
    inside = tuple(f"{name}." for name, _ in model.named_children())
    # Tensors of a larger network, such as one with another block: a part of it would fit.
    more = [k for k in left if k.startswith(inside) and not k.startswith(f"{head}.")]
    wrong = _counted(missing, "missing") + _counted(shaped, "of another shape")
    return ", ".join([*wrong, *_counted(more, "too many")]), left


def _complete_head(tensors: dict[str, Tensor], of_head: Mapping[str, Tensor]) -> list[str]:
    """Return remarks on the head in a file; a head without a bias gets a bias of 0."""
    weight, bias = of_head
    if weight not in tensors:
        return [NO_HEAD]
    remarks, n_classes = [], len(tensors[weight])
    if n_classes != len(of_head[weight]):
        remarks.append(f"its head has {n_classes} classes")
    if bias not in tensors:
        remarks.append("its head has no bias: 0 is used")
        tensors[bias] = tensors[weight].new_zeros(n_classes)
    return remarks


def _alike(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return all(k in tensors and tensors[k].shape == v.shape for k, v in own.items())


def _counted(names: list[str], what: str) -> list[str]:
    return [f"{len(names)} tensors {what} (such as {names[0]})"] if names else []


def _head_of(tensors: Mapping[str, Tensor], of_head: Mapping[str, Tensor]) -> str:
    """Return why the head in a file doesn't fit; empty if it does, or is missing."""
    given = [k for k in of_head if k in tensors]
    if given == list(of_head)[1:]:
        return f"an incomplete head (only {given[0]})"
    if len({len(tensors[k]) for k in given if tensors[k].ndim}) > 1:
        return f"a head of inconsistent shapes (such as {given[0]})"
    wrong = [
        k for k in given if tensors[k].shape[1:] != of_head[k].shape[1:] or not tensors[k].ndim
    ]
    return "".join(_counted(wrong, "of another shape"))


def _by_torch(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the missing and the unexpected tensors, as the modules' own loading code finds them.

    That code reads older versions: BatchNorm before PyTorch 0.4.1 doesn't count batches, and older
    ViTs of torchvision have other names for the layers of their MLPs.
    """
    shadow = copy.deepcopy(model)
    try:
        found = shadow.load_state_dict(tensors, strict=False)
    except RuntimeError:  # an older name with another shape
        return [k for k in shadow.state_dict() if k not in tensors], []
    return list(found.missing_keys), list(found.unexpected_keys)


def _renamed(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Remove wrapping layers and a common prefix from the names, and update old names."""
    segments = {part for name in own for part in name.split(".")}
    wrapped = WRAPPED - segments
    bare = {".".join(p for p in k.split(".") if p not in wrapped): v for k, v in tensors.items()}
    remarks = []
    if gone := sorted({p for k in tensors for p in k.split(".") if p in wrapped}):
        remarks.append(f"without the wrapping {', '.join(gone)}")
    named: dict[str, Tensor] = {}
    capture: Any = SimpleNamespace(load_state_dict=named.update)
    given: Any = SimpleNamespace(get_state_dict=lambda **_: dict(bare))
    # torchvision's own conversion of the old names of its DenseNets; other names don't change.
    torchvision.models.densenet._load_state_dict(capture, given, progress=False)
    prefix = _prefix(named, own)
    if prefix:
        outside = len([k for k in named if not k.startswith(prefix)])
        beside = f", {outside} tensors outside it left out" if outside else ""
        remarks.append(f"without the prefix `{prefix}`{beside}")
        named = checkpoint.strip_prefix(named, prefix)
    return named, remarks


def _prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Find the prefix under which most of the network's tensors are, by name and shape."""
    counts: dict[str, int] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[i:])
            if name in own and own[name].shape == tensor.shape:
                prefix = key.removesuffix(name)
                counts[prefix] = counts.get(prefix, 0) + 1
    # Of equally good ones, such as a query and its momentum copy, the first one was trained.
    return max(counts, key=lambda prefix: counts[prefix]) if counts else ""


def _filtered(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert published tensors to those of timm's network, if timm has a filter for it.

    It changes shapes and names, and leaves out what older versions stored, such as the masks of a
    Swin transformer.
    """
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        return dict(convert(dict(tensors), model))
    except Exception:  # the file may be of a network that the filter isn't made for
        return tensors


def _refuse_no_numbers(file: Path, state: State) -> None:
    for name, tensor in state.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            n = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(
                f"{file}: {name} holds {n} NaN or infinite values; choose another file"
            )
