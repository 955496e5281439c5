"""Fuse a convolution with the BatchNorm and the ReLU that follow it.

With frozen statistics, BatchNorm is one scale and one shift per channel. Scaling the convolution's
weights instead of its output saves two passes over the activations, and applying the ReLU in the
same pass saves a third. The rescaling is part of the autograd graph, so weight, scale and shift get
the same gradients as in the unfused network.

Convolutions and linear layers run in bfloat16 if the processor supports it. Weights stay float32.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.nets.blocks import evaluating, traced_size
from pipeline.nets.convolve import ACTS, Act, convolve, shape_of
from pipeline.nets.device import device, device_of
from pipeline.stage_runtime.errors import ParamError, is_out_of_memory, one_line

Precision = Literal["auto", "fp32", "bf16"]
NUMBER_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Follower:
    """The BatchNorm and the activation that directly follow a convolution."""

    bn: nn.BatchNorm2d
    act: Act = "none"
    act_module: nn.Module | None = None


@dataclass
class Kept:
    """Folded weights, and the tensors that they were folded from."""

    folded: tuple[Tensor, Tensor | None] = field(init=False)
    # Each tensor, its memory and its version. The references keep both from being reused.
    _sources: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

    def keep(self, tensors: Sequence[Tensor], folded: tuple[Tensor, Tensor | None]) -> None:
        """Store the folded weights of these tensors in place of earlier ones."""
        self._sources = [(t, t.detach(), t._version) for t in tensors]
        self.folded = folded

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the folded weights are those of these tensors in their current state."""
        return len(tensors) == len(self._sources) and all(
            t is of and t.data_ptr() == memory.data_ptr() and t._version == version
            for t, (of, memory, version) in zip(tensors, self._sources, strict=True)
        )


def resolved(precision: Precision) -> Literal["fp32", "bf16"]:
    """Resolve `auto` to the number format that this machine supports, by its flags alone."""
    if precision != "auto":
        return precision
    if device().type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def fuse(model: nn.Module, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """Make a network run fused and in the given number format; its state_dict is unchanged.

    A BatchNorm in train mode runs unfused, with batch statistics. The last linear layer returns
    float32 logits.
    """
    low = NUMBER_FORMATS[precision]
    followers = _followers(model)
    linear = None
    for module in model.modules():
        if is_plain(module):
            _fold_convolution(module, followers.get(module), low)
        elif isinstance(module, nn.Conv2d):
            _widen(module)
        elif isinstance(module, nn.Linear):
            module.forward = _linear(module, low)  # type: ignore[method-assign, assignment]
            linear = module
    if linear is not None:
        linear.forward = _linear(linear, torch.float32)  # type: ignore[method-assign, assignment]
    if precision == "bf16" and _computes_otherwise(model):
        if linear is not None:
            linear.forward = _autocast(linear.forward, None)  # type: ignore[method-assign]
        model.forward = _autocast(model.forward, low)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch omits it
    return model


def _computes_otherwise(model: nn.Module) -> bool:
    """Return whether a network has weights outside of convolutions, BatchNorm and linear layers."""
    usual = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    others = (m for m in model.modules() if not isinstance(m, usual))
    return any(True for m in others for _ in m.parameters(recurse=False))


def _autocast(forward: Callable[..., Tensor], low: torch.dtype | None) -> Callable[..., Tensor]:
    """Let PyTorch choose the format of all that isn't rewritten here, such as attention.

    None keeps it from doing so.
    """

    def within(x: Tensor, *rest: Any, **more: Any) -> Tensor:
        with torch.autocast(x.device.type, low, enabled=low is not None):
            return forward(x, *rest, **more)

    return within


def is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a convolution with unmodified weights and zero padding.

    Other kinds, for example, standardise their weights first.
    """
    plain = type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame"
    return plain and getattr(module, "padding_mode", "") == "zeros"


def _widen(conv: nn.Conv2d) -> None:
    """Make a convolution that isn't fused accept bfloat16 input."""
    unfolded = conv.forward
    conv.forward = lambda x: unfolded(x.float())  # type: ignore[method-assign, assignment]


Key = tuple[int, int]  # of a tensor: its id and its version


class _Readers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it untyped
    """Records which modules read the watched tensors, as seen by PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[Key, set[nn.Module | None]] = {}  # None: read outside of `inside`
        self.inside: list[nn.Module] = []  # BatchNorm layers and activations that are running

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the tensors among an operator's arguments, and run it."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _key(tensor) in self.of:
                self.of[_key(tensor)].add(self.inside[0] if self.inside else None)
        return func(*args, **(kwargs or {}))

    def watch(self, tensor: Tensor) -> Key:
        """Record from now on who reads a tensor; return its key."""
        self.of[_key(tensor)] = set()
        return _key(tensor)


def _key(x: Tensor) -> Key:
    # A tensor that a residual was added to in place is no longer the layer's output. Watched
    # tensors are kept, so that their ids aren't reused.
    return id(x), x._version


def _followers(model: nn.Module) -> dict[nn.Module, Follower]:
    """Find the convolutions whose output only one BatchNorm reads, by running the model.

    The ReLU after the BatchNorm is fused too if nothing else reads the BatchNorm's output: it is
    inside the BatchNorm, as in timm, or it is a module that is called once. Networks that normalise
    before the convolution add the output of a convolution to another one, besides normalising it.
    """
    convolutions: dict[Key, tuple[nn.Module, Tensor]] = {}
    normalised: dict[Key, tuple[Follower, Tensor]] = {}
    found: dict[nn.Module, Follower] = {}
    calls: dict[nn.Module, int] = {}
    readers = _Readers()

    def after_convolution(module: nn.Module, inputs: Any, output: Tensor) -> None:
        convolutions[readers.watch(output)] = (module, output)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        readers.inside.append(module)
        calls[module] = calls.get(module, 0) + 1
        if type(module) in ACTS and _key(inputs[0]) in normalised:
            follower = normalised[_key(inputs[0])][0]
            if follower.act_module is None:
                follower.act, follower.act_module = ACTS[type(module)], module

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        readers.inside.pop()
        if isinstance(module, nn.BatchNorm2d) and _key(inputs[0]) in convolutions:
            follower = Follower(module)
            inside = getattr(module, "act", None)
            if inside is not None and type(inside) in ACTS:
                follower.act, follower.act_module = ACTS[type(inside)], inside
            else:
                normalised[readers.watch(output)] = (follower, output)
            found[convolutions[_key(inputs[0])][0]] = follower

    handles, size = [], traced_size(model)
    for module in model.modules():
        if is_plain(module):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d) or type(module) in ACTS:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    with evaluating(model), torch.no_grad(), readers:  # inference mode doesn't count versions
        model(torch.zeros(1, 3, size, size, device=device_of(model)))
    for handle in handles:
        handle.remove()

    for key, (convolution, _) in convolutions.items():
        follower = found.get(convolution)
        if follower is not None and readers.of[key] - {follower.bn}:
            del found[convolution]
    for key, (follower, _) in normalised.items():
        if readers.of[key] - {follower.act_module}:
            follower.act, follower.act_module = "none", None
    for follower in found.values():
        if follower.act_module is not None and calls[follower.act_module] > 1:
            follower.act, follower.act_module = "none", None
    # A BatchNorm that also normalises something else stays as it is.
    folds = Counter(follower.bn for follower in found.values())
    return {
        conv: follower
        for conv, follower in found.items()
        if folds[follower.bn] == calls[follower.bn]
    }


def _fold_convolution(conv: nn.Conv2d, follower: Follower | None, low: torch.dtype) -> None:
    bn = follower.bn if follower else None
    depthwise = conv.groups == conv.in_channels == conv.out_channels

    def sources() -> list[Tensor]:
        # Looked up each time, as a network that is moved to a GPU has other buffers there.
        of_bn = (bn.weight, bn.bias, bn.running_mean, bn.running_var) if bn is not None else ()
        return [t for t in (conv.weight, conv.bias, *of_bn) if t is not None]

    kept = Kept()

    def folded(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if bn is None:
            return conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
        assert bn.running_var is not None
        assert bn.running_mean is not None
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)  # (D,)
        shift = bn.bias - bn.running_mean * scale
        bias = shift if conv.bias is None else shift + conv.bias * scale
        return (conv.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)

    def folded_once() -> tuple[Tensor, Tensor | None]:
        # Frozen tensors change only when they are loaded or replaced. Fused optimisers change
        # trained ones without a new version.
        tensors = sources()
        if any(t.requires_grad for t in tensors):
            return folded(low)
        if not kept.is_of(tensors):
            kept.keep(tensors, folded(low))
        return kept.folded

    def forward(x: Tensor) -> Tensor:
        shape = shape_of(conv, (x.shape[2], x.shape[3]))
        if bn is not None and bn.training:
            # Batch statistics of rounded values would be inaccurate.
            return convolve(x.float(), conv.weight, conv.bias, shape, "none")
        if not torch.is_grad_enabled():

            def run(dtype: torch.dtype) -> Tensor:
                weights = folded_once() if dtype == low else folded(dtype)
                return convolve(x.to(dtype), *weights, shape, act)

            return _in_format(run, low)
        # oneDNN's gradients of grouped convolutions are slow in bfloat16.
        slow = conv.groups > 1 and not depthwise and x.device.type == "cpu"
        return _in_format(
            lambda dtype: convolve(x.to(dtype), *folded(dtype), shape, act),
            torch.float32 if slow else low,
        )

    act: Act = follower.act if follower else "none"
    conv.forward = forward  # type: ignore[method-assign, assignment]
    if follower is not None:
        _pass_on(follower)


def _pass_on(follower: Follower) -> None:
    """Make BatchNorm and ReLU return their input, as the convolution has applied them already."""
    bn, act = follower.bn, follower.act_module
    unfolded = bn.forward
    # timm's BatchNorm layers carry dropout and activation inside.
    rest = [m for m in (getattr(bn, "drop", None), getattr(bn, "act", None)) if m is not None]

    def forward(x: Tensor) -> Tensor:
        if bn.training:
            return unfolded(x)
        for module in rest:
            x = module(x)
        return x

    bn.forward = forward  # type: ignore[method-assign, assignment]
    if act is not None:
        clip = act.forward
        act.forward = lambda x: clip(x) if bn.training else x


def _linear(linear: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        def run(dtype: torch.dtype) -> Tensor:
            bias = None if linear.bias is None else linear.bias.to(dtype)
            return F.linear(x.to(dtype), linear.weight.to(dtype), bias)

        return _in_format(run, dtype)

    return forward


def _in_format(run: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """Run a layer in a number format.

    Raises ParamError if the layer fails in this format but not in float32: the processor's library
    may not support bfloat16.
    """
    try:
        return run(dtype)
    except RuntimeError as error:
        if dtype == torch.float32 or is_out_of_memory(error):
            raise
        failed = error
    try:
        run(torch.float32)
    except RuntimeError:
        raise failed from None
    name = next(name for name, known in NUMBER_FORMATS.items() if known == dtype)
    raise ParamError(
        f"params.yaml: precision: {name} fails on this machine ({one_line(failed)}); "
        "set precision: fp32"
    ) from failed
