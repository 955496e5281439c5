"""Fit the new head at stage 1's image size, on the codes that the cut network gives there."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images.augment import Flips, views
from pipeline.images.rows import Rows
from pipeline.nets.backbone import head_name
from pipeline.nets.batches import in_batches
from pipeline.nets.network import Network
from pipeline.probing.probes import Ints, Scaler, fit_linear, head_of, linear_probe
from pipeline.stage_runtime.resume import Resume
from pipeline.training.cut import Cut
from pipeline.training.fit import SampleWeights
from pipeline.training.trunk_cache import Batch

# The image and one flip, each a row of its own: the network sees one view at a time, and the head
# of an image's mean codes is worse on it. Of more or randomly drawn views it is no better.
VIEWS, MOST_ROWS = 2, 100_000


def head_views(flips: Flips, images: int) -> int:
    """Return how many flips of each image the head is fitted on: one, where images are many."""
    return len(views(flips, VIEWS if VIEWS * images <= MOST_ROWS else 1))


def fit_head(
    network: Network,
    cut: Cut,
    batch: Batch,
    n_views: int,
    rows: Rows,
    weighing: SampleWeights,
    c: float,
    resume: Resume,
) -> None:
    """Replace the head by a logistic regression on its inputs, fitted like the linear probe.

    The probe's head is fitted to the codes of extract's image size; at another one its logits can
    be far off. `batch(view, rows)` returns the outputs of the cut's trunk; C is the probe's.
    """
    weights = rows.weights if weighing.sample_weight else np.ones(len(rows.labels))
    balance = None if weighing.class_weight == "none" else weighing.class_weight

    def fitted() -> dict[str, Any]:
        of_views = [_codes(network, cut, batch, len(rows.labels), v + 1) for v in range(n_views)]
        codes = np.concatenate(of_views)
        labels, shares = np.tile(rows.labels, n_views), np.tile(weights / n_views, n_views)
        scaler = Scaler.fit(codes)
        found = fit_linear(scaler(codes), labels, shares, c, balance)
        weight, bias = head_of(linear_probe(found, scaler, "last", False, c))
        return {"weight": weight.tolist(), "bias": bias.tolist()}

    tensors = {k: torch.tensor(v) for k, v in resume.remember("head", fitted).items()}
    network.model.get_submodule(head_name(network.model)).load_state_dict(tensors)


def _codes(network: Network, cut: Cut, batch: Batch, n: int, view: int) -> NDArray[np.float32]:
    """Compute the head's inputs (N, D) for a view of all images."""
    given: list[Tensor] = []
    head: nn.Module = network.model.get_submodule(head_name(network.model))
    hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))

    def compute(rows: Ints) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            cut.top(batch(view, rows))
        return [given.pop().float().cpu().numpy()]

    network.model.eval()
    try:
        return np.concatenate([part for (part,) in in_batches(n, compute)])
    finally:
        hook.remove()
