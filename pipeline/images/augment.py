"""Augmentation as a function of seed, epoch and image: the same in any order, resumed or not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from pipeline.stage_runtime.schema import Key

Flips = Literal["none", "horizontal", "both", "dihedral"]
# The number of kinds of `dihedral` that each allows: flips, then flips with quarter turns.
KINDS: dict[Flips, int] = {"none": 1, "horizontal": 2, "both": 4, "dihedral": 8}


@dataclass(frozen=True)
class Augment:
    """How a training image may be augmented without changing its class."""

    flips: Annotated[Flips, Key("flips")]  # both: also vertical; dihedral: also quarter turns
    # The smallest share of the area that a random crop keeps; 1 is off.
    crop: Annotated[float, Key("augment.crop"), Interval(gt=0, le=1)]
    # How far brightness and contrast may change, as a share; 0 is off.
    light: Annotated[float, Key("augment.light"), Interval(ge=0, lt=1)]


def augment(pixels: Tensor, ids: NDArray[np.int64], epoch: int, seed: int, how: Augment) -> Tensor:
    """Augment images (B, H, W) or (B, H, W, 3) of 0..255; returns the same shape, in float32.

    Crops follow Inception's (area and an aspect ratio of 3/4 to 4/3), resized back to H x W.
    """
    u = _uniform(ids, epoch, seed)  # (B, 7)
    x = pixels
    if how.flips != "none":
        kinds = (u[:, 0] * KINDS[how.flips]).astype(np.int64)
        x = torch.cat([dihedral(pixels[i : i + 1], int(kind)) for i, kind in enumerate(kinds)])
    x = x.to(torch.float32)
    if how.crop < 1:
        x = _cropped(x, u[:, 1:5], how.crop)
    if how.light > 0:
        factors = torch.from_numpy(1 + how.light * (2 * u[:, 5:7] - 1)).to(x)
        shape = (-1, *[1] * (x.ndim - 1))
        mean = x.mean(tuple(range(1, x.ndim)), keepdim=True)
        x = (x - mean) * factors[:, 0].view(shape) + mean * factors[:, 1].view(shape)
        x = x.clamp(0, 255)
    return x


def dihedral(images: Tensor, kind: int, rows: int = 1) -> Tensor:
    """Flip and turn square images (B, H, W[, 3]): kind 0 is none, 1 a horizontal flip, up to 7.

    `rows` is the dimension of the height, before that of the width: 2 for planes (B, 3, H, W).
    """
    if kind & 1:
        images = images.flip(rows + 1)
    if kind & 2:
        images = images.flip(rows)
    if kind & 4:
        images = images.transpose(rows, rows + 1)
    return images


def views(flips: Flips, n: int) -> Sequence[int]:
    """List the kinds of `dihedral` to average a prediction over, at most `n`."""
    return range(min(n, KINDS[flips]))


def _uniform(ids: NDArray[np.int64], epoch: int, seed: int) -> NDArray[np.float64]:
    """Draw seven numbers in [0, 1) per image from a counter-based generator."""
    key = np.array([seed, epoch], np.uint64)
    return np.stack(
        [
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(i)])).random(7)
            for i in ids
        ]
    )


def _cropped(x: Tensor, u: NDArray[np.float64], smallest: float) -> Tensor:
    area = smallest + (1 - smallest) * u[:, 0]
    ratio = np.exp(math.log(4 / 3) * (2 * u[:, 1] - 1))
    width, height = np.sqrt(area * ratio).clip(max=1), np.sqrt(area / ratio).clip(max=1)
    theta = np.zeros((len(u), 2, 3))  # from the output's coordinates in -1..1 to the input's
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2] = (1 - width) * (2 * u[:, 2] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * u[:, 3] - 1)
    planes = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)  # (B, 1 or 3, H, W)
    grid = F.affine_grid(torch.from_numpy(theta).to(x), list(planes.shape), align_corners=False)
    planes = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
    return planes[:, 0] if x.ndim == 3 else planes.permute(0, 2, 3, 1)
