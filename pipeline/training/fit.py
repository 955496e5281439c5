"""The training loop of both stages, written out."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.nets.blocks import is_inside, layer_groups
from pipeline.stage_runtime.distributed import all_reduce_gradients, shard
from pipeline.stage_runtime.errors import PipelineError
from pipeline.stage_runtime.progress import track
from pipeline.stage_runtime.schema import Key
from pipeline.stage_runtime.settings import rank
from pipeline.training.average import Average
from pipeline.training.resume_state import Position, ResumeState
from pipeline.training.schedule import Epochs, Schedule, epochs_of, layer_factors, rate

Ints = NDArray[np.int64]

# In the names of a transformer's class token, registers and positions, relative ones too.
PLACES = ("_token", "pos_emb", "position", "relative_", "rel_pos")
EXPLODED = 1000.0  # nats: the right class at a probability of e^-1000


class DivergedError(PipelineError):
    """The loss is NaN or infinite, or too high for training to recover."""


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training, the same ones for both stages."""

    epochs: Epochs
    batch_size: Annotated[int, Ge(2)]
    optimizer: Literal["adamw", "sgd"]
    lr: Annotated[float, Gt(0)]
    # Factor on the rate for each block further from the head.
    layer_decay: Annotated[float, Interval(gt=0, le=1)]
    weight_decay: Annotated[float, Ge(0)]  # not on biases and normalisation
    momentum: Annotated[float, Interval(ge=0, lt=1)]  # of sgd
    schedule: Schedule
    warmup_epochs: Annotated[float, Ge(0)]
    step_epochs: Annotated[int, Ge(1)]  # of the step schedule
    gamma: Annotated[float, Interval(gt=0, le=1)]
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)]
    average_epochs: Annotated[float, Ge(0)]  # the window of the averaged weights; 0: the last ones


@dataclass(frozen=True)
class SampleWeights:
    """How images are weighted in training."""

    sample_weight: Annotated[bool, Key("sample_weight")]  # by its weight in index.csv
    class_weight: Annotated[Literal["none", "balanced"], Key("class_weight")]  # balanced: by rarity


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch of training."""

    epoch: int
    lr: float  # at the head, at the epoch's last step
    loss: float
    accuracy: float
    seconds: float


def fit(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    batch: Callable[[int, Ints], Tensor],
    labels: Ints,
    weights: NDArray[np.float64],
    recipe: Recipe,
    seed: int,
    resume_state: ResumeState | None = None,
) -> Iterator[Epoch]:
    """Train a model's trainable parameters, yielding after each epoch.

    With `average_epochs`, the model holds the averaged weights while it is yielded.

    `batch(epoch, rows)` returns the input of `forward`, which returns logits (B, C). `labels` and
    `weights` are (N,); the weights have mean 1. The order of the images depends on seed and epoch
    alone; an incomplete last batch is dropped. With a resume state, training continues where an
    earlier run stopped, with bit-identical results, and saves its own state.

    Raises DivergedError with the epoch and the learning rate if the loss is not finite or explodes.
    """
    n = len(labels)
    size = min(recipe.batch_size, n)
    steps = n // size
    epochs = epochs_of(recipe.epochs, n, size)
    optimizer = make_optimizer(model, recipe)
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = Average(model, recipe.average_epochs * steps) if recipe.average_epochs else None
    begin = resume_state.resume(model, optimizer, average) if resume_state else Position(1)
    for epoch in range(begin.epoch, epochs + 1):
        start = time.perf_counter()
        order = np.random.default_rng([seed, epoch]).permutation(n)
        if not begin.step:
            # For dropout in the trained layers, which differs between processes.
            torch.manual_seed(seed * 100_003 + epoch + (rank() << 32))
        model.train()
        total_loss, total_right, factor = begin.loss, begin.right, 0.0
        left = (steps - begin.step) * size  # images
        for step in track(
            range(begin.step, steps), left, f"epoch {epoch}", lambda step: size, summary=False
        ):
            rows = order[step * size : (step + 1) * size]
            factor = rate(
                recipe.schedule,
                (epoch - 1) * steps + step,
                steps,
                epochs,
                recipe.warmup_epochs,
                recipe.step_epochs,
                recipe.gamma,
            )
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            own = shard(rows)
            share, hits = 0.0, 0.0  # if a batch has fewer images than there are processes
            if len(own):
                logits = forward(batch(epoch, own))
                target = torch.from_numpy(labels[own]).to(logits.device)
                losses = F.cross_entropy(
                    logits, target, reduction="none", label_smoothing=recipe.label_smoothing
                )
                weighted = losses * torch.from_numpy(weights[own]).to(losses)
                loss = weighted.mean() * (len(own) / len(rows))  # its share of the whole batch's
                loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
                share, hits = loss.item(), float((logits.argmax(1) == target).sum())
            value, right = all_reduce_gradients(model, share, hits)
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update((epoch - 1) * steps + step + 1)
            if not math.isfinite(value) or value > EXPLODED:
                raise DivergedError(
                    f"epoch {epoch}: the loss is {value:g} at learning rate "
                    f"{recipe.lr * factor:g}; lower the stage's lr"
                )
            total_loss += value
            total_right += int(right)
            if resume_state and resume_state.is_due() and step + 1 < steps:
                place = Position(epoch, step + 1, total_loss, total_right)
                resume_state.save(model, optimizer, place, average)
        rates = (total_loss / steps, total_right / (steps * size))
        seconds = time.perf_counter() - start
        with average.in_place() if average else nullcontext():
            yield Epoch(epoch, recipe.lr * factor, *rates, seconds)
        begin = Position(epoch + 1)
        if resume_state:  # which includes the validation of this epoch
            resume_state.save(model, optimizer, begin, average)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return an optimiser that holds exactly the trainable parameters.

    It has one parameter group per pair of block and weight decay. Blocks further from the head have
    lower rates; biases, normalisation, tokens and positions have no weight decay.
    """
    factors = layer_factors(layer_groups(model), recipe.layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = [f for block, f in factors.items() if is_inside(name, block)]
            # A parameter outside all blocks belongs to no depth: it gets the lowest rate.
            factor = inside[0] if inside else min(factors.values())
            is_weight = parameter.ndim > 1 and not any(part in name for part in PLACES)
            decay = recipe.weight_decay if is_weight else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
    settings = [
        {"params": parameters, "lr": recipe.lr * factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=recipe.momentum, fused=True)
    return torch.optim.AdamW(settings, fused=True)


def training_weights(
    labels: Ints, weights: NDArray[np.float64], n_classes: int, how: SampleWeights
) -> NDArray[np.float64]:
    """Combine sample weights and class weights (as scikit-learn's `balanced`) to a mean of 1."""
    combined = weights.astype(np.float64) if how.sample_weight else np.ones(len(labels))
    if how.class_weight == "balanced":
        counts = np.bincount(labels, minlength=n_classes)
        combined = combined * (len(labels) / (n_classes * np.maximum(counts, 1)))[labels]
    return np.asarray(combined / combined.mean())
