"""A convolution and the BatchNorm behind it as one, each kind in the number format it likes.

With frozen statistics, BatchNorm is a scale and a shift a channel: scaling the convolution's
weights instead of its output saves two passes over the activations. The rescaling is part of the
graph, so that weight, scale and shift get the gradients they would get unfolded.

Pointwise and full convolutions run in bfloat16 where the processor has it. Depthwise ones do so
only without gradients: their backward pass in bfloat16 is slow on such processors. Weights stay
float32 throughout.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.blocks import TRACE_SIZE

Precision = Literal["auto", "fp32", "bf16"]
Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def resolved(precision: Precision) -> Literal["fp32", "bf16"]:
    """Turn `auto` into the number format that this machine is good at, by its flags alone."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def fold(model: nn.Module, precision: Literal["fp32", "bf16"]) -> nn.Module:
    """Make a network's forward run folded and in the given format; its state_dict is unchanged.

    A BatchNorm in train mode runs as it is, by batch statistics. The last linear layer gives
    float32 logits.
    """
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    followers = _batchnorm_behind(model)
    linear = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _fold_convolution(module, followers.get(module), low)
        elif isinstance(module, nn.Linear):
            module.forward = _linear(module, low)  # type: ignore[method-assign, assignment]
            linear = module
    if linear is not None:
        linear.forward = _linear(linear, torch.float32)  # type: ignore[method-assign, assignment]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch omits it
    return model


def _batchnorm_behind(model: nn.Module) -> dict[nn.Module, nn.BatchNorm2d]:
    """Find the convolutions whose output goes straight into a BatchNorm, by running the model."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[nn.Module, nn.BatchNorm2d] = {}

    def after(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[id(output)] = (module, output)  # keeping the tensor keeps its id its own

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            convolution = outputs[id(inputs[0])][0]
            assert isinstance(module, nn.BatchNorm2d)
            found[convolution] = module

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(before))
    training = [m for m in model.modules() if m.training]
    model.eval()
    with torch.inference_mode():
        model(torch.zeros(1, 3, TRACE_SIZE, TRACE_SIZE))
    for handle in handles:
        handle.remove()
    for module in training:
        module.training = True
    return found


def _fold_convolution(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, low: torch.dtype) -> None:
    convolve = _convolve(conv)
    depthwise = conv.groups > 1

    def forward(x: Tensor) -> Tensor:
        dtype = torch.float32 if depthwise and torch.is_grad_enabled() else low
        weight, bias = conv.weight, conv.bias
        if bn is not None and not bn.training:
            assert bn.running_var is not None
            assert bn.running_mean is not None
            scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)  # (D,)
            shift = bn.bias - bn.running_mean * scale
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else shift + bias * scale
        elif bn is not None:
            dtype = torch.float32  # batch statistics of rounded values would be poor ones
        return convolve(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    conv.forward = forward  # type: ignore[method-assign, assignment]
    if bn is not None:
        bn.forward = _after_folded(bn)  # type: ignore[method-assign, assignment]


def _after_folded(bn: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    unfolded = bn.forward
    # timm's BatchNorm layers carry the activation inside.
    rest = [m for m in (getattr(bn, "drop", None), getattr(bn, "act", None)) if m is not None]

    def forward(x: Tensor) -> Tensor:
        if bn.training:
            return unfolded(x)
        for module in rest:
            x = module(x)
        return x

    return forward


def _convolve(conv: nn.Conv2d) -> Convolve:
    if type(conv).__name__ == "Conv2dSame":  # timm's padding as TensorFlow does it
        import timm.layers

        conv2d_same: Any = timm.layers.conv2d_same  # type: ignore[attr-defined]  # not in __all__

        def same(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor = conv2d_same(
                x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups
            )
            return y

        return same
    return conv._conv_forward


def _linear(linear: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        bias = None if linear.bias is None else linear.bias.to(dtype)
        return F.linear(x.to(dtype), linear.weight.to(dtype), bias)

    return forward
