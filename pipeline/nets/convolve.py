"""A convolution and the ReLU that follows it in one pass, with fast gradients on a processor."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.nets import depthwise

Act = Literal["none", "relu", "relu6"]
ACTS: dict[type[nn.Module], Act] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
# The fused operator that PyTorch's compiler uses; its result is bit-identical to the two steps.
FUSED: dict[Act, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
HAS_FUSED = hasattr(torch.ops.mkldnn, "_convolution_pointwise")


@dataclass(frozen=True)
class Shape:
    """The geometry of a convolution; pairs are (vertical, horizontal)."""

    stride: tuple[int, ...]
    before: tuple[int, int]  # padding above and to the left
    after: tuple[int, int]  # below and to the right
    dilation: tuple[int, ...]
    groups: int


def shape_of(conv: nn.Conv2d, size: tuple[int, int]) -> Shape:
    """Return a convolution's geometry for input H x W; timm's `Conv2dSame` pads like TensorFlow."""
    if conv.padding == "same":
        pads = [divided(d * (k - 1)) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    elif conv.padding == "valid":
        pads = [(0, 0), (0, 0)]
    else:
        pads = [(int(pad), int(pad)) for pad in conv.padding]
    if type(conv).__name__ == "Conv2dSame":
        pads = [
            divided(max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0))
            for n, k, s, d in zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True)
        ]
    (top, bottom), (left, right) = pads
    return Shape(conv.stride, (top, left), (bottom, right), conv.dilation, conv.groups)


def divided(padding: int) -> tuple[int, int]:
    """Split a padding in two; the second part is the larger one."""
    return padding // 2, padding - padding // 2


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, act: Act) -> Tensor:
    """Convolve (B, D, H, W) and apply the activation; all tensors have the same number format."""
    if torch.is_grad_enabled() and x.device.type == "cpu":  # cuDNN's gradients are fast
        y: Tensor = _Convolution.apply(x, weight, bias, shape, act)  # type: ignore[no-untyped-call]
        return y
    return _forward(x, weight, bias, shape, act)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, act: Act) -> Tensor:
    x, weight, padding = _evenly(x, weight, shape)
    if HAS_FUSED and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
        attr, scalars = FUSED[act]
        fused: Tensor = torch.ops.mkldnn._convolution_pointwise(
            *(x, weight, bias, padding, shape.stride, shape.dilation, shape.groups),
            *(attr, scalars, ""),
        )
        return fused
    y = F.conv2d(x, weight, bias, shape.stride, padding, shape.dilation, shape.groups)
    return y.relu_() if act == "relu" else y.clamp_(0, 6) if act == "relu6" else y


def _evenly(x: Tensor, weight: Tensor, shape: Shape) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Return input, weight and a padding that is the same on both sides.

    If one side has a pixel less, the kernel gets a row and a column of zeros instead, which is
    cheaper than a padded copy of the input.
    """
    if shape.before == shape.after:
        return x, weight, shape.before
    if all(a == b + 1 for b, a in zip(shape.before, shape.after, strict=True)) and (
        shape.dilation == (1, 1)
    ):
        return x, F.pad(weight, (1, 0, 1, 0)), shape.after
    (top, left), (bottom, right) = shape.before, shape.after
    return F.pad(x, (left, right, top, bottom)), weight, (0, 0)


class _Convolution(torch.autograd.Function):
    """`_forward` with gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape, act: Act
    ) -> Tensor:
        y = _forward(x, weight, bias, shape, act)
        ctx.save_for_backward(x, weight, None if act == "none" else y)
        ctx.shape, ctx.act = shape, act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        shape: Shape = ctx.shape
        if ctx.act == "relu":
            dy = torch.ops.aten.threshold_backward(dy, y, 0.0)
        elif ctx.act == "relu6":
            dy = torch.ops.aten.hardtanh_backward(dy, y, 0.0, 6.0)
        dy = dy.contiguous(memory_format=torch.channels_last)
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        # In two steps, as a sum over the first and the last dimensions at once is slow.
        db = dy.sum((2, 3)).float().sum(0).to(dy.dtype) if for_bias else None
        if shape.groups == x.shape[1] == len(weight) and shape.dilation == (1, 1):
            dx = dw = None
            if for_x:
                size = (x.shape[2], x.shape[3])
                dx = depthwise.input_gradient(dy, weight, size, shape.stride, shape.before)
            if for_weight:
                kernel = (weight.shape[2], weight.shape[3])
                dw = depthwise.weight_gradient(
                    x, dy, kernel, shape.stride, shape.before, shape.after
                )
            return dx, dw, db, None, None
        even_x, even_weight, padding = _evenly(x, weight, shape)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *(dy, even_x, even_weight, None, shape.stride, padding, shape.dilation),
            *(False, (0, 0), shape.groups, (for_x, for_weight, False)),
        )
        if dw is not None:  # without the zeros that `_evenly` may have put in front
            dw = dw[:, :, -weight.shape[2] :, -weight.shape[3] :]
        if dx is not None and even_x is not x:
            (top, left), (height, width) = shape.before, x.shape[2:]
            dx = dx[:, :, top : top + height, left : left + width]
        return dx, dw, db, None, None
