"""Interpolate a network's weights before and after training (arXiv 2109.01903)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.stage_runtime.resume import Resume
from pipeline.training.best_epoch import Stop, Validation, quality

State = dict[str, Tensor]
FACTORS = (0.25, 0.5, 0.75)  # what is validated between the two states


def between(first: State, second: State, factor: float) -> State:
    """Interpolate two states of a network linearly: factor 0 is the first, 1 the second."""
    return {
        name: torch.lerp(first[name], second[name], factor)
        if first[name].is_floating_point()
        else second[name]
        for name in first
    }


def interpolation(
    model: nn.Module,
    first: State,
    second: State,
    validate: Callable[[], Validation],
    resume: Resume,
) -> list[tuple[float, Validation]]:
    """Validate the networks between two states."""

    def at(factor: float) -> Validation:
        model.load_state_dict(between(first, second, factor))
        return validate()

    return [(f, resume.remember(f"factor {f}", partial(at, f))) for f in FACTORS]


def choose_factor(
    curve: list[tuple[float, Validation]], stop: Stop, images: int
) -> tuple[float, Validation]:
    """Choose the last point, or the best one if `stop` prefers it; of equals the smaller factor."""
    best = max(curve, key=lambda point: (quality(point[1], stop.measure), -point[0]))
    return best if stop.prefers(best[1], curve[-1][1], images) else curve[-1]
