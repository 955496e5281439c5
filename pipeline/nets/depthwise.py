"""The gradients of a depthwise convolution, composed of fast convolutions.

oneDNN is slow at the weight gradient of kernels wider than three pixels and, in bfloat16, at the
input gradient of strided convolutions. Both are composed of fast cases here: wide kernels of groups
of columns, strides of positions with the same residue. Together this is three to eight times as
fast (bench/ratios.py).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 3  # columns of a kernel up to which oneDNN is fast
Pair = tuple[int, int]


def input_gradient(
    dy: Tensor, weight: Tensor, size: Pair, stride: Sequence[int], before: Pair
) -> Tensor:
    """Compute the gradient of the input (B, D, H, W) from that of the output (B, D, h, w).

    Input positions with the same residue modulo the stride depend on taps of one residue only:
    their gradient is the output's gradient, convolved with these taps, flipped. `before` is the
    padding above and to the left, `size` the input's H and W; the weight is (D, 1, k, k).
    """
    rows = list(_residues(weight.shape[2], stride[0], before[0], size[0], dy.shape[2]))
    columns = list(_residues(weight.shape[3], stride[1], before[1], size[1], dy.shape[3]))
    whole = len(rows) == len(columns) == 1
    dx = dy.new_empty((*dy.shape[:2], *size)).contiguous(memory_format=torch.channels_last)
    for row, (i, above, below) in enumerate(rows):
        for column, (j, left, right) in enumerate(columns):
            taps = weight[:, :, i :: stride[0], j :: stride[1]].flip(2, 3)
            if 0 in taps.shape:  # a stride wider than the kernel skips some pixels
                part = dy.new_zeros(())
            elif above == below and left == right and min(above, left) >= 0:
                part = F.conv2d(dy, taps, padding=(above, left), groups=len(weight))
            else:
                part = F.conv2d(padded(dy, (left, right, above, below)), taps, groups=len(weight))
            if whole:
                return part
            dx[:, :, row :: stride[0], column :: stride[1]] = part
    return dx


def _residues(
    kernel: int, stride: int, before: int, size: int, outputs: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the first tap and the required padding for each residue of the input's position.

    Output o reads input stride * o + j - before with tap j. Input stride * m + residue is therefore
    read by output m - q - shift with tap j = first + stride * q.
    """
    for residue in range(min(stride, size)):
        first = (residue + before) % stride
        shift = (first - residue - before) // stride
        taps = len(range(first, kernel, stride))
        positions = len(range(residue, size, stride))
        yield first, shift + taps - 1, positions - outputs - shift


def padded(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Pad (B, D, H, W) with zeros, or crop it, by `pads`: left, right, above and below.

    `F.pad` takes twice as long, because it fills the whole tensor before it copies.
    """
    left, right, above, below = pads
    n, d, height, width = x.shape
    size = (n, d, above + height + below, left + width + right)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    # The part of the input that is kept; empty if more is cropped than there is.
    top, first = max(above, 0), max(left, 0)
    bottom, last = max(min(size[2], above + height), top), max(min(size[3], left + width), first)
    y[:, :, top:bottom, first:last] = x[
        :, :, top - above : bottom - above, first - left : last - left
    ]
    y[:, :, :top] = 0
    y[:, :, bottom:] = 0
    y[:, :, :, :first] = 0
    y[:, :, :, last:] = 0
    return y


def weight_gradient(
    x: Tensor, dy: Tensor, kernel: Pair, stride: Sequence[int], before: Pair, after: Pair
) -> Tensor:
    """Compute the gradient of the weight (D, 1, k, k) from the input and the output's gradient.

    It is computed a few columns at a time, each time with a shifted input.
    """
    (top, left), (bottom, right) = before, after
    down = top if top == bottom else 0
    parts = []
    for first in range(0, kernel[1], WIDE):
        columns = min(WIDE, kernel[1] - first)
        ends = left - first, right - (kernel[1] - first - columns)
        across = ends[0] if ends[0] == ends[1] >= 0 else 0
        pads = (ends[0] - across, ends[1] - across, top - down, bottom - down)
        weight = dy.new_empty((x.shape[1], 1, kernel[0], columns))  # only its shape is used
        shifted = padded(x, pads) if any(pads) else x
        parts.append(
            torch.ops.aten.convolution_backward(
                *(dy, shifted, weight, None, stride, (down, across), (1, 1)),
                *(False, (0, 0), x.shape[1], (False, True, False)),
            )[1]
        )
    return torch.cat(parts, 3)
