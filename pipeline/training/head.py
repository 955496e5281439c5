"""Fit the new head at stage 1's image size, on the codes that the cut network gives there."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images.augment import KINDS, Augment
from pipeline.images.rows import Rows
from pipeline.nets.backbone import head_name
from pipeline.nets.batches import in_batches
from pipeline.nets.network import Network
from pipeline.probing.probes import Ints, Scaler, fit_linear, head_of, linear_probe
from pipeline.stage_runtime.resume import Resume
from pipeline.training.cut import Cut
from pipeline.training.fit import SampleWeights
from pipeline.training.trunk_cache import Batch

# Augmented versions of an image whose codes are averaged: extract takes as many flips. Where the
# trunk has to run once more for them, since stage 1 crops, it takes fewer.
MOST_VIEWS, MOST_MORE_VIEWS = 4, 2


def head_views(views: int, how: Augment) -> tuple[int, Augment]:
    """Return how many views of each image the head is fitted on, and how they are augmented.

    They are flipped alone, as whole images are what the head is validated on. If stage 1's own
    `views` are cropped or relit, they are others.
    """
    whole = replace(how, crop=1.0, light=0.0)
    if whole == how:
        return min(views, MOST_VIEWS), how
    return min(MOST_MORE_VIEWS, KINDS[how.flips]), whole


def fit_head(
    network: Network,
    cut: Cut,
    batch: Batch,
    views: int,
    rows: Rows,
    weighing: SampleWeights,
    c: float,
    resume: Resume,
) -> None:
    """Replace the head by a logistic regression on its inputs, fitted like the linear probe.

    The probe's head is fitted to the codes of extract's image size; at another one its logits can
    be far off. `batch(epoch, rows)` returns the outputs of the cut's trunk; C is the probe's.
    """
    weights = rows.weights if weighing.sample_weight else np.ones(len(rows.labels))
    balance = None if weighing.class_weight == "none" else weighing.class_weight
    used = range(1, 1 + max(views, 1))

    def fitted() -> dict[str, Any]:
        codes = np.mean(
            [_codes(network, cut, batch, len(rows.labels), view) for view in used], axis=0
        )
        scaler = Scaler.fit(codes)
        found = fit_linear(scaler(codes), rows.labels, weights, c, balance)
        weight, bias = head_of(linear_probe(found, scaler, "last", False, c))
        return {"weight": weight.tolist(), "bias": bias.tolist()}

    tensors = {k: torch.tensor(v) for k, v in resume.remember("head", fitted).items()}
    network.model.get_submodule(head_name(network.model)).load_state_dict(tensors)


def _codes(network: Network, cut: Cut, batch: Batch, n: int, epoch: int) -> NDArray[np.float32]:
    """Compute the head's inputs (N, D) for all images as they are augmented in an epoch."""
    given: list[Tensor] = []
    head: nn.Module = network.model.get_submodule(head_name(network.model))
    hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))

    def compute(rows: Ints) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            cut.top(batch(epoch, rows))
        return [given.pop().float().cpu().numpy()]

    network.model.eval()
    try:
        return np.concatenate([part for (part,) in in_batches(n, compute)])
    finally:
        hook.remove()
