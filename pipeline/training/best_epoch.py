"""Train, validate after each epoch, keep the best epoch, and write the history."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pipeline.stage_runtime.files import write_csv, write_json
from pipeline.stage_runtime.progress import say
from pipeline.training.fit import EXPLODED, DivergedError, Epoch
from pipeline.training.resume_state import Kept, ResumeState

Validation = dict[str, float]
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclass
class Best:
    """The best epoch so far: its weights and its metrics."""

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
    patience: int,
    resume_state: ResumeState,
    *,
    start_counts: bool = False,
) -> Best:
    """Run a stage's epochs and return the best one.

    The best epoch is chosen by validation accuracy, then by loss; of equal epochs, the earlier one
    is chosen. `before` are validations before the first step, the rows of epoch 0 in history.csv.
    With `start_counts`, the last of them is a candidate too. Training stops early after `patience`
    epochs without a better one; 0 disables this. history.csv and metrics.json are rewritten after
    each epoch, so that a run can be monitored. `resume_state`, which `epochs` saves, keeps the
    history and the best epoch for a resumed run.
    """
    rows: list[Sequence[object]] = [_row(0, None, val) for val in before]
    best: Best | None = None
    if start_counts:
        best = Best(0, None, before[-1], state_of(model))
    if resume_state.kept.facts:  # of a run that was killed
        rows = resume_state.kept.facts["rows"]
        best = Best(**resume_state.kept.facts["best"], state=resume_state.kept.best)
        _write(stage, out, rows, best)
    for epoch in epochs:
        val = validate()
        if not math.isfinite(val["loss"]) or val["loss"] > EXPLODED:
            raise DivergedError(
                f"epoch {epoch.epoch}: the validation loss is {val['loss']:g} after learning rate "
                f"{epoch.lr:g}; lower {stage}.lr"
            )
        if best is None or better(val, best.val):
            best = Best(epoch.epoch, epoch.accuracy, val, state_of(model))
        rows.append(_row(epoch.epoch, epoch, val))
        _write(stage, out, rows, best)
        said = {k: v for k, v in vars(best).items() if k != "state"}
        resume_state.kept = Kept({"rows": rows, "best": said}, best.state)
        say(
            f"epoch {epoch.epoch:>3}  train loss {epoch.loss:.4f} acc {epoch.accuracy:.4f}  "
            f"val loss {val['loss']:.4f} acc {val['accuracy']:.4f}  "
            f"best {best.val['accuracy']:.4f} (epoch {best.epoch})  "
            f"lr {epoch.lr:.1e}  {epoch.seconds:.1f} s"
        )
        if patience and epoch.epoch - best.epoch >= patience:
            say(f"stopped early: no better epoch in {patience}")
            break
    assert best is not None
    model.load_state_dict(best.state)
    return best


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy a network's parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def better(later: Validation, earlier: Validation) -> bool:
    """Return whether a later validation beats an earlier one: by accuracy, then by loss."""
    return (later["accuracy"], -later["loss"]) > (earlier["accuracy"], -earlier["loss"])


def _write(stage: str, out: Path, rows: Sequence[Sequence[object]], best: Best) -> None:
    write_csv(out / "history.csv", [COLUMNS, *rows])
    write_metrics(out, stage, best.val, epochs=int(str(rows[-1][0])), best_epoch=best.epoch)


def write_metrics(out: Path, stage: str, val: Validation, **more: float) -> None:
    """Write a stage's metrics.json under its own top-level key."""
    write_json(out / "metrics.json", {stage: {"val": val, **more}})


def _row(number: int, epoch: Epoch | None, val: Validation) -> Sequence[object]:
    trained = (epoch.lr, epoch.loss, epoch.accuracy) if epoch else ("", "", "")
    return (number, *trained, val["loss"], val["accuracy"])
