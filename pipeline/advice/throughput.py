"""Measure how fast stages 1 and 2 and evaluate run on this machine, on a few batches of each."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images.augment import Augment, augment
from pipeline.nets.batches import eval_batch
from pipeline.nets.device import finish
from pipeline.nets.device_images import DeviceImages
from pipeline.nets.network import Network
from pipeline.stage_runtime.files import Rowwise
from pipeline.training.cut import cut_below
from pipeline.training.fit import Recipe, fit
from pipeline.training.freeze import everything, freeze_all_but

BATCHES = 4  # that are timed, after a warm-up,
MOST_SECONDS = 10.0  # until this time has passed, for a network that takes seconds for each


@dataclass(frozen=True)
class Throughput:
    """Seconds per image."""

    trunk: float  # stage 1's frozen part, forward
    top: float  # stage 1's trained part: forward, backward, step
    step: float  # stage 2: forward, backward, step
    first: float  # forward alone at stage 1's size
    second: float  # forward alone at stage 2's size


def measure(
    network: Network,
    trained: list[str],
    images: Rowwise,
    sizes: tuple[int, int],
    batch_size: int,
    how: Augment,
) -> Throughput:
    """Time a few batches of packed images (N, H, W[, 3]) as both stages would run them.

    `sizes` are the image sizes of stages 1 and 2. The network can't be used afterwards.
    """

    def normalised(epoch: int, rows: NDArray[np.int64]) -> Tensor:
        rows = rows % len(images)
        return network.normalise(augment(feed(rows), rows, epoch, 0, how))

    feed = DeviceImages(images, network.device)
    some = np.arange(eval_batch())
    network.take(sizes[0])
    network.model.eval()
    with torch.no_grad():
        first = _seconds(lambda: network.model(normalised(1, some))) / len(some)
        cut = cut_below(network.model, trained, network.image_size)
        trunk = _seconds(lambda: cut.trunk(normalised(1, some))) / len(some)
        kept = cut.trunk(normalised(1, np.arange(batch_size)))
    # Random weights use the statistics of the batch, as in stage 1: with their initial running
    # statistics, logits may overflow.
    statistics = "train" if network.backbone.weights == "none" else "frozen"
    freeze_all_but(network.model, trained, statistics)
    top = _training(network, cut.top, lambda epoch, rows: kept, batch_size)
    cut.undo()

    network.take(sizes[1])
    with torch.no_grad():
        second = _seconds(lambda: network.model(normalised(1, some))) / len(some)
    freeze_all_but(network.model, everything(network.model), statistics)
    step = _training(network, network.model, normalised, batch_size)
    return Throughput(trunk, top, step, first, second)


def _seconds(run: Callable[[], object]) -> float:
    """Return the median time of a call, after a first one."""
    run()
    finish()
    taken: list[float] = []
    while len(taken) < BATCHES and sum(taken) < MOST_SECONDS:
        start = time.perf_counter()
        run()
        finish()
        taken.append(time.perf_counter() - start)
    return median(taken)


def _training(
    network: Network,
    forward: Callable[[Tensor], Tensor],
    batch: Callable[[int, NDArray[np.int64]], Tensor],
    batch_size: int,
) -> float:
    """Return the seconds per image of a step."""
    # The rate only has to be low enough for the network to stay finite.
    recipe = Recipe(
        epochs=1 + BATCHES,  # of one step each
        batch_size=batch_size,
        optimizer="adamw",
        lr=1e-9,
        layer_decay=1.0,
        weight_decay=0.0,
        momentum=0.0,
        schedule="constant",
        warmup_epochs=0.0,
        step_epochs=1,
        gamma=1.0,
        label_smoothing=0.0,
        average_epochs=0.0,
    )
    labels, weights = np.zeros(batch_size, np.int64), np.ones(batch_size)
    epochs = fit(network.model, forward, batch, labels, weights, recipe, seed=0)
    return _seconds(lambda: next(epochs)) / batch_size
