"""Class activation maps: where in an image the evidence for a class lies.

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): the sum of the last feature maps, each weighted
by the gradient of the class's score, averaged over its pixels. Evidence against the class is left
out. If a linear head follows average pooling, these are the maps of Zhou et al. 2016, arXiv
1512.04150.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.final_model.graph import Graph, Part
from pipeline.nets.blocks import with_maps
from pipeline.nets.tokens import has_class_token, layout_of
from pipeline.probing.codes import LAST, SOURCE

UPRIGHT = (0,)  # no flips or turns


def explained_blocks(graph: Graph) -> list[str]:
    """Return the block of each part whose feature maps are used."""
    return [_explained_block(part, graph.inputs.shape) for part in graph.parts]


def _explained_block(part: Part, shape: tuple[int, ...]) -> str:
    """Return the last block that the scores depend on.

    If a class token is pooled, the patches that the last block returns don't count any more.
    """
    if part.taps and part.taps.depths[-1] not in (LAST, SOURCE):
        return part.taps.depths[-1]
    blocks = with_maps(part.model)
    if not has_class_token(part.model):
        return blocks[-1]
    noise = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
    return next(b for b in reversed(blocks) if _gradient(part, b, noise, np.zeros(1, int))[1].any())


def activation_maps(
    graph: Graph, images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return maps (N, h, w) of the evidence in packed images (N, H, W[, 3]) for one class each.

    The values are from 0 to 1, the maximum of each image; all are 0 if there is no evidence. Of
    several parts it is the mean of their maps, by their weights, on the finest one's grid.
    """
    maps = [
        part.weight * _evidence(part, block, images, classes)
        for part, block in zip(graph.parts, explained_blocks(graph), strict=True)
    ]
    if len(maps) > 1:
        finest = max((tuple(m.shape[1:]) for m in maps), key=math.prod)
        resized = [F.interpolate(m[:, None], finest, mode="bilinear")[:, 0] for m in maps]
        maps = [_to_one(torch.stack(resized).sum(0))]
    return maps[0].numpy()


def _evidence(
    part: Part, block: str, images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> Tensor:
    """Return a part's maps (N, h, w), from 0 to 1."""
    maps, gradient = _gradient(part, block, images, classes)
    return _to_one((maps * gradient.mean((2, 3), keepdim=True)).sum(1).relu())


def _to_one(evidence: Tensor) -> Tensor:
    """Divide maps (N, h, w) by each one's maximum, if it has one."""
    strongest = evidence.amax((1, 2), keepdim=True)
    return evidence / torch.where(strongest > 0, strongest, 1)


def _gradient(
    part: Part, name: str, images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return a block's feature maps (N, D, h, w), and the gradient of each image's score there."""
    found: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    block = part.model.get_submodule(name)
    # Before the hooks that take a probe's codes, so that gradients flow through the codes.
    handle = block.register_forward_hook(cut, prepend=True)
    try:
        scores = part.scores(torch.from_numpy(images), UPRIGHT)  # (N, C)
    finally:
        handle.remove()
    (maps,) = found
    chosen = scores[torch.arange(len(classes)), torch.from_numpy(classes)]
    (gradient,) = torch.autograd.grad(chosen.sum(), maps)
    layout = layout_of(tuple(maps.shape))
    assert layout is not None
    maps, gradient = layout.as_maps(maps), layout.as_maps(gradient)  # (N, D, h, w)
    return maps.detach(), gradient
