"""Averaging over flips and turns of an image, for codes and for logits alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.images.augment import Flips, dihedral, views
from pipeline.nets.network import Network

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Viewing:
    """Which flips and turns of an image are averaged."""

    flips: Flips
    most: int


def averaged(network: Network, compute: Run, viewing: Viewing) -> Run:
    """Make a function of packed pixels (B, H, W[, 3]) that averages outputs over the views.

    `compute` maps normalised images (B, 3, h, w) to one or several tensors (B, ...).
    """
    kinds = views(viewing.flips, viewing.most)

    def run(pixels: Tensor) -> Sequence[Tensor]:
        runs = [compute(network.normalise(dihedral(pixels, kind))) for kind in kinds]
        return [torch.stack([t.float() for t in same]).mean(0) for same in zip(*runs, strict=True)]

    return run
