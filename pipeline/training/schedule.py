"""Learning rates as pure functions of plain numbers."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge

from pipeline.stage_runtime.schema import Auto

Schedule = Literal["cosine", "step", "constant"]
Epochs = Auto | Annotated[int, Ge(1)]  # auto: see epochs_of
# Few images need more passes: what counts is the number of steps (Kolesnikov et al. 2020,
# arXiv 1912.11370). Ten passes or more brought the same on 200 and on 950 images.
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 300, 4, 10


def rate(
    schedule: Schedule,
    step: int,
    steps_an_epoch: int,
    epochs: int,
    warmup_epochs: float = 0.0,
    step_epochs: int = 7,
    gamma: float = 0.1,
) -> float:
    """Return the factor on the learning rate at a step, counted from 0.

    A linear warm-up, then: `cosine` falls to 0 at the end (Loshchilov and Hutter 2017,
    arXiv 1608.03983), `step` multiplies by `gamma` every `step_epochs`, `constant` stays.
    """
    warmup = round(warmup_epochs * steps_an_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        total = max(epochs * steps_an_epoch - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
    if schedule == "step":
        return float(gamma ** (step // steps_an_epoch // step_epochs))
    return 1.0


def epochs_of(asked: Epochs, images: int, batch_size: int) -> int:
    """Return the number of epochs: as asked, or as many as give STEPS steps, within limits."""
    if asked != "auto":
        return asked
    steps_an_epoch = images // min(batch_size, images)
    return min(max(math.ceil(STEPS / steps_an_epoch), FEWEST_EPOCHS), MOST_EPOCHS)


def layer_factors(blocks: Sequence[Sequence[str]], layer_decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each module: 1 in the last block, less below.

    The modules of a block share a depth. Source: Howard and Ruder 2018, arXiv 1801.06146.
    """
    last = len(blocks) - 1
    return {name: layer_decay ** (last - i) for i, block in enumerate(blocks) for name in block}
