"""Train, validate after each epoch, keep the last or the best one, and write the history."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from pipeline.stage_runtime.files import write_csv, write_json
from pipeline.stage_runtime.progress import say
from pipeline.training.fit import EXPLODED, DivergedError, Epoch
from pipeline.training.resume_state import Kept, ResumeState

Validation = dict[str, float]
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Stop:
    """When training stops, and which epoch is kept."""

    keep: Literal["last", "best"]
    patience: Annotated[int, Ge(0)]

    def prefers(self, earlier: Validation, last: Validation, images: int) -> bool:
        """Return whether an earlier network counts rather than the last one.

        With `keep: best` it does unless the last one is better; with `keep: last`, only if its
        accuracy is higher by more than a standard error: the highest of several is often luck.
        """
        if self.keep == "best":
            return quality(earlier) >= quality(last)
        return clearly_better(earlier, last, images)


@dataclass
class Best:
    """The epoch that is kept so far: its weights and its metrics."""

    epoch: int
    train_accuracy: float | None  # none before the first step
    val: Validation
    state: dict[str, Tensor]


def best_epoch(
    stage: str,
    out: Path,
    model: nn.Module,
    epochs: Iterator[Epoch],
    validate: Callable[[], Validation],
    before: list[Validation],
    stop: Stop,
    resume_state: ResumeState,
    images: int,
    *,
    start_counts: bool = False,
) -> Best:
    """Run a stage's epochs and return the one to keep.

    That is the last one, or with `keep: best` the one with the best validation accuracy, then loss;
    of equal epochs, the earlier one. `before` are validations before the first step, the rows of
    epoch 0 in history.csv, of so many images. With `start_counts`, the network as it was is kept
    if `stop` prefers it. Training stops early after `patience` epochs without a better one; 0
    disables this. history.csv and metrics.json are rewritten after each epoch, so that a run can
    be monitored. `resume_state`, which `epochs` saves, keeps the history and the kept epoch for a
    resumed run.
    """
    rows: list[Sequence[object]] = [_row(0, None, val) for val in before]
    start = Best(0, None, before[-1], state_of(model)) if start_counts else None
    kept = start
    if resume_state.kept.facts:  # of a run that was killed
        rows = resume_state.kept.facts["rows"]
        kept = Best(**resume_state.kept.facts["best"], state=resume_state.kept.best)
        _write(stage, out, rows, kept)
    for epoch in epochs:
        val = validate()
        if not math.isfinite(val["loss"]) or val["loss"] > EXPLODED:
            raise DivergedError(
                f"epoch {epoch.epoch}: the validation loss is {val['loss']:g} after learning rate "
                f"{epoch.lr:g}; lower {stage}.lr"
            )
        if stop.keep == "last" or kept is None or quality(val) > quality(kept.val):
            kept = Best(epoch.epoch, epoch.accuracy, val, state_of(model))
        rows.append(_row(epoch.epoch, epoch, val))
        _write(stage, out, rows, kept)
        said = {k: v for k, v in vars(kept).items() if k != "state"}
        resume_state.kept = Kept({"rows": rows, "best": said}, kept.state)
        best, accuracy = _best_of(rows, start_counts)
        say(
            f"epoch {epoch.epoch:>3}  train loss {epoch.loss:.4f} acc {epoch.accuracy:.4f}  "
            f"val loss {val['loss']:.4f} acc {val['accuracy']:.4f}  "
            f"best {accuracy:.4f} (epoch {best})  "
            f"lr {epoch.lr:.1e}  {epoch.seconds:.1f} s"
        )
        if stop.patience and epoch.epoch - best >= stop.patience:
            say(f"stopped early: no better epoch in {stop.patience}")
            break
    assert kept is not None
    if start and stop.prefers(start.val, kept.val, images):
        kept = start
        _write(stage, out, rows, kept)
    model.load_state_dict(kept.state)
    return kept


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy a network's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quality(val: Validation) -> tuple[float, float]:
    """Return a key by which validations are ordered: by accuracy, then by loss."""
    return val["accuracy"], -val["loss"]


def clearly_better(one: Validation, other: Validation, images: int) -> bool:
    """Return whether one accuracy is higher by more than the standard error of the difference."""
    a, b = one["accuracy"], other["accuracy"]
    return a - b > math.sqrt((a * (1 - a) + b * (1 - b)) / images)


def _best_of(rows: Sequence[Sequence[Any]], start_counts: bool) -> tuple[int, float]:
    """Return the number and the validation accuracy of the epoch with the best validation."""
    counts = [row for row in rows if row[0] > 0]
    if start_counts or not counts:
        counts = [[row for row in rows if row[0] == 0][-1], *counts]
    vals = [dict(zip(("loss", "accuracy"), row[-2:], strict=True)) for row in counts]
    place = max(range(len(vals)), key=lambda i: (quality(vals[i]), -i))
    return counts[place][0], vals[place]["accuracy"]


def _write(stage: str, out: Path, rows: Sequence[Sequence[object]], best: Best) -> None:
    write_csv(out / "history.csv", [COLUMNS, *rows])
    write_metrics(out, stage, best.val, epochs=int(str(rows[-1][0])), best_epoch=best.epoch)


def write_metrics(out: Path, stage: str, val: Validation, **more: float) -> None:
    """Write a stage's metrics.json under its own top-level key."""
    write_json(out / "metrics.json", {stage: {"val": val, **more}})


def _row(number: int, epoch: Epoch | None, val: Validation) -> Sequence[object]:
    trained = (epoch.lr, epoch.loss, epoch.accuracy) if epoch else ("", "", "")
    return (number, *trained, val["loss"], val["accuracy"])
