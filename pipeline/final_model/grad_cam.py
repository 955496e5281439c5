"""Class activation maps: where in an image the evidence for a class lies.

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391): the sum of the last feature maps, each weighted
by the gradient of the class's score, averaged over its pixels. Evidence against the class is left
out. If a linear head follows average pooling, these are the maps of Zhou et al. 2016, arXiv
1512.04150.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.final_model.graph import Graph
from pipeline.nets.blocks import with_maps
from pipeline.nets.tokens import has_class_token, layout_of
from pipeline.probing.codes import LAST, SOURCE

UPRIGHT = (0,)  # no flips or turns


def explained_block(graph: Graph) -> str:
    """Return the block whose feature maps are used: the last one that the scores depend on.

    If a class token is pooled, the patches that the last block returns don't count any more.
    """
    if graph.taps and graph.taps.depths[-1] not in (LAST, SOURCE):
        return graph.taps.depths[-1]
    blocks = with_maps(graph.model)
    if not has_class_token(graph.model):
        return blocks[-1]
    noise = np.random.default_rng(0).integers(0, 256, (1, *graph.inputs.shape), np.uint8)
    return next(
        b for b in reversed(blocks) if _gradient(graph, b, noise, np.zeros(1, int))[1].any()
    )


def activation_maps(
    graph: Graph, images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return maps (N, h, w) of the evidence in packed images (N, H, W[, 3]) for one class each.

    The values are from 0 to 1, the maximum of each image; all are 0 if there is no evidence.
    """
    maps, gradient = _gradient(graph, explained_block(graph), images, classes)
    with torch.no_grad():
        evidence = (maps * gradient.mean((2, 3), keepdim=True)).sum(1).relu()
        strongest = evidence.amax((1, 2), keepdim=True)
        return (evidence / torch.where(strongest > 0, strongest, 1)).numpy()


def _gradient(
    graph: Graph, name: str, images: NDArray[np.uint8], classes: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Return a block's feature maps (N, D, h, w), and the gradient of each image's score there."""
    found: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    block = graph.model.get_submodule(name)
    # Before the hooks that take a probe's codes, so that gradients flow through the codes.
    handle = block.register_forward_hook(cut, prepend=True)
    try:
        scores = graph.scores(torch.from_numpy(images), UPRIGHT)  # (N, C)
    finally:
        handle.remove()
    (maps,) = found
    chosen = scores[torch.arange(len(classes)), torch.from_numpy(classes)]
    (gradient,) = torch.autograd.grad(chosen.sum(), maps)
    layout = layout_of(tuple(maps.shape))
    assert layout is not None
    maps, gradient = layout.as_maps(maps), layout.as_maps(gradient)  # (N, D, h, w)
    return maps.detach(), gradient
