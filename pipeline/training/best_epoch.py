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
from pipeline.stage_runtime.schema import Key, Measure
from pipeline.training.fit import EXPLODED, DivergedError, Epoch
from pipeline.training.resume_state import Kept, ResumeState

Validation = dict[str, float]
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Stop:
    """When training stops, and which epoch is kept."""

    keep: Literal["last", "best"]
    patience: Annotated[int, Ge(0)]
    measure: Annotated[Measure, Key("measure")] = "accuracy"

    def improves(self, val: Validation, kept: Validation) -> bool:
        """Return whether an epoch is better than the one that is kept."""
        return quality(val, self.measure) > quality(kept, self.measure)

    def prefers(self, earlier: Validation, last: Validation, images: int) -> bool:
        """Return whether an earlier network counts rather than the last one.

        With `keep: best` it does unless the last one is better; with `keep: last`, only if its
        measure is better by more than a standard error: the best of several is often luck.
        """
        if self.keep == "best":
            return quality(earlier, self.measure) >= quality(last, self.measure)
        return clearly_better(earlier, last, images, self.measure)


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

    That is the last one, or with `keep: best` the one with the best measure on validation, then
    loss; of equal epochs, the earlier one. `before` are validations before the first step, the
    rows of epoch 0 in history.csv, of so many images. With `start_counts`, the network as it was
    is kept if `stop` prefers it. Training stops early after `patience` epochs without a better
    one; 0 disables this. history.csv and metrics.json are rewritten after each epoch, so that a
    run can be monitored. `resume_state`, which `epochs` saves, keeps the history and the kept
    epoch for a resumed run.
    """
    table = History(stop.measure)
    rows: list[Sequence[object]] = [table.row(0, None, val) for val in before]
    start = Best(0, None, before[-1], state_of(model)) if start_counts else None
    kept = start
    if resume_state.kept.facts:  # of a run that was killed
        rows = resume_state.kept.facts["rows"]
        kept = Best(**resume_state.kept.facts["best"], state=resume_state.kept.best)
        _write(stage, out, table, rows, kept)
    for epoch in epochs:
        val = validate()
        if not math.isfinite(val["loss"]) or val["loss"] > EXPLODED:
            raise DivergedError(
                f"epoch {epoch.epoch}: the validation loss is {val['loss']:g} after learning rate "
                f"{epoch.lr:g}; lower {stage}.lr"
            )
        if stop.keep == "last" or kept is None or stop.improves(val, kept.val):
            kept = Best(epoch.epoch, epoch.accuracy, val, state_of(model))
        rows.append(table.row(epoch.epoch, epoch, val))
        _write(stage, out, table, rows, kept)
        said = {k: v for k, v in vars(kept).items() if k != "state"}
        resume_state.kept = Kept({"rows": rows, "best": said}, kept.state)
        best, value = table.best(rows, start_counts)
        say(
            f"epoch {epoch.epoch:>3}  train loss {epoch.loss:.4f} acc {epoch.accuracy:.4f}  "
            f"val {in_words(val, stop.measure)}  best {value:.4f} (epoch {best})  "
            f"lr {epoch.lr:.1e}  {epoch.seconds:.1f} s"
        )
        if stop.patience and epoch.epoch - best >= stop.patience:
            say(f"stopped early: no better epoch in {stop.patience}")
            break
    assert kept is not None
    if start and stop.prefers(start.val, kept.val, images):
        kept = start
        _write(stage, out, table, rows, kept)
    model.load_state_dict(kept.state)
    return kept


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy a network's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quality(val: Validation, measure: Measure = "accuracy") -> tuple[float, ...]:
    """Return a key by which validations are ordered: by the measure, then by loss.

    A measure that isn't defined on these images is not in `val`.
    """
    return (val[measure], -val["loss"]) if measure in val else (-val["loss"],)


def clearly_better(
    one: Validation, other: Validation, images: int, measure: Measure = "accuracy"
) -> bool:
    """Return whether one is better by more than the standard error of the difference."""
    if measure == "accuracy":
        a, b = one["accuracy"], other["accuracy"]
        error = math.sqrt((a * (1 - a) + b * (1 - b)) / images)
    else:
        of = f"{measure if measure in one else 'log_loss'}_error"
        error = math.hypot(one[of], other[of])
    return quality(one, measure)[0] - quality(other, measure)[0] > error


def in_words(val: Validation, measure: Measure) -> str:
    """Return the loss, the accuracy and the measure as text."""
    own = measure in val and measure != "accuracy"
    more = f" {measure} {val[measure]:.4f}" if own else ""
    return f"loss {val['loss']:.4f} acc {val['accuracy']:.4f}{more}"


def own_column(measure: Measure) -> list[str]:
    """Return the measure if a table has to name it besides accuracy and loss."""
    return [] if measure in ("accuracy", "log_loss") else [measure]


@dataclass(frozen=True)
class History:
    """The table of a stage's epochs; a measure that isn't in each table is the last column."""

    measure: Measure

    @property
    def columns(self) -> tuple[str, ...]:
        """Name them."""
        return (*COLUMNS, *(f"val_{name}" for name in own_column(self.measure)))

    def row(self, number: int, epoch: Epoch | None, val: Validation) -> Sequence[object]:
        """Return the cells of an epoch; what isn't known is empty."""
        trained = (epoch.lr, epoch.loss, epoch.accuracy) if epoch else ("", "", "")
        more = [val.get(name.removeprefix("val_"), "") for name in self.columns[len(COLUMNS) :]]
        return (number, *trained, val["loss"], val["accuracy"], *more)

    def best(self, rows: Sequence[Sequence[Any]], start_counts: bool) -> tuple[int, float]:
        """Return the number of the epoch with the best validation, and what it is best by."""
        counts = [row for row in rows if row[0] > 0]
        if start_counts or not counts:
            counts = [[row for row in rows if row[0] == 0][-1], *counts]
        names = [name.removeprefix("val_") for name in self.columns[4:]]
        cells = [dict(zip(names, row[4:], strict=True)) for row in counts]
        vals = [{name: cell for name, cell in of.items() if cell != ""} for of in cells]
        place = max(range(len(vals)), key=lambda i: (quality(vals[i], self.measure), -i))
        return counts[place][0], abs(quality(vals[place], self.measure)[0])


def _write(
    stage: str, out: Path, table: History, rows: Sequence[Sequence[object]], best: Best
) -> None:
    write_csv(out / "history.csv", [table.columns, *rows])
    write_metrics(out, stage, best.val, epochs=int(str(rows[-1][0])), best_epoch=best.epoch)


def write_metrics(out: Path, stage: str, val: Validation, **more: float) -> None:
    """Write a stage's metrics.json under its own top-level key."""
    write_json(out / "metrics.json", {stage: {"val": val, **more}})
