"""Test-time augmentation: codes or logits, averaged over flips and turns of an image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images.augment import Flips, dihedral, views
from pipeline.nets.batches import run_in_batches
from pipeline.nets.network import Network
from pipeline.stage_runtime.files import Rowwise

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class TTA:
    """The flips and turns of an image that are averaged."""

    flips: Flips
    most: int


def averaged(network: Network, compute: Run, tta: TTA) -> Run:
    """Return a function of packed pixels (B, H, W[, 3]) that averages outputs over the views.

    `compute` maps normalised images (B, 3, h, w) to one or several tensors (B, ...).
    """
    kinds = views(tta.flips, tta.most)

    def run(pixels: Tensor) -> Sequence[Tensor]:
        x = network.normalise(pixels)
        runs = [compute(dihedral(x, kind, rows=2)) for kind in kinds]
        return [torch.stack([t.float() for t in same]).mean(0) for same in zip(*runs, strict=True)]

    return run


def logits(network: Network, images: Rowwise, tta: TTA) -> NDArray[np.float64]:
    """Compute a network's logits (N, C) of packed images (N, H, W[, 3]), averaged over views."""
    return np.concatenate([part[0] for part in logits_from(network, images, tta)])


def logits_from(
    network: Network, images: Rowwise, tta: TTA, first: int = 0
) -> Iterator[Sequence[NDArray[np.float64]]]:
    """Yield the same logits in batches, from the `first` image on."""
    network.model.eval()
    run = averaged(network, lambda x: [network.model(x)], tta)
    for part in run_in_batches(images, network, run, first):
        yield [part[0].astype(np.float64)]
