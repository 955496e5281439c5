"""From packed pixels to a network's input: shrunk, normalised, in the first layer's format."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def shrunk(pixels: Tensor, image_size: int, interpolation: str = "bicubic") -> Tensor:
    """Resize larger pixels (B, H, W) or (B, H, W, 3) to `image_size`, in float32.

    Resizing uses antialiasing, and commutes with flips and quarter turns.
    """
    if pixels.shape[2] == image_size:
        return pixels
    x = pixels.to(torch.float32)
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)  # (B, 1 or 3, H, W)
    x = F.interpolate(x, [image_size, image_size], mode=interpolation, antialias=True)
    return x[:, 0] if pixels.ndim == 3 else x.permute(0, 2, 3, 1)


def normalised(
    x: Tensor,
    means: Sequence[float],
    stds: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Turn uint8 or 0..255 pixels (B, h, w) or (B, h, w, 3) into the input (B, 3, h, w).

    The input is in the layout and number format of the first convolution: channels last and
    `dtype`. Means and standard deviations are for pixels in 0..1.
    """
    # Integers up to 255 are exact in either format; resized pixels aren't integers.
    x = x.to(dtype if x.dtype == torch.uint8 else torch.float32)
    if x.ndim == 4:
        return _standardised(x, means, stds).to(dtype).permute(0, 3, 1, 2)
    # Grey: one plane for all channels with the same normalisation.
    kinds = list(zip(means, stds, strict=True))
    planes = {(m, s): _standardised(x, [m], [s]).to(dtype) for m, s in set(kinds)}
    y = torch.empty(*x.shape, len(kinds), dtype=dtype, device=x.device)
    for channel, kind in enumerate(kinds):
        y[..., channel] = planes[kind]
    return y.permute(0, 3, 1, 2)


def _standardised(pixels: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Standardise each channel (B, H, W[, D]) by 255 times its mean and standard deviation.

    The computation is in float32, whatever the input's format, in one pass over whole rows.
    """
    rows = pixels.flatten(2).flatten(0, 1)  # (B * H, W * D)
    columns = torch.tensor([means, stds], device=pixels.device).repeat(1, pixels.shape[2])
    mean, std = 255 * columns
    return F.batch_norm(rows, mean, std**2, eps=0).view(pixels.shape)
