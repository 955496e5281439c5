"""Stage 2: load stage 1's checkpoint and train the full network at a low learning rate."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images.augment import Augment, augment
from pipeline.images.shards import read_facts, read_splits, refuse_larger
from pipeline.inference.tta import TTA, logits
from pipeline.nets import checkpoint
from pipeline.nets.automatic import STAGE_2_AT, input_size
from pipeline.nets.checkpoint import refuse_other_classes, versions
from pipeline.nets.device import set_up_torch
from pipeline.nets.device_images import DeviceImages
from pipeline.nets.fuse import Precision, resolved
from pipeline.nets.network import Network, load
from pipeline.scoring.metrics import undefined, validation
from pipeline.stage_runtime.errors import CheckpointError
from pipeline.stage_runtime.files import write_csv
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Auto, Key, Out, Seed
from pipeline.training.best_epoch import (
    Stop,
    Validation,
    best_epoch,
    in_words,
    own_column,
    state_of,
    write_metrics,
)
from pipeline.training.fit import Recipe, SampleWeights, fit, training_weights
from pipeline.training.freeze import everything, freeze_all_but, refuse_shared_statistics
from pipeline.training.interpolate import between, choose_factor, interpolation
from pipeline.training.resume_state import ResumeState

# How much a checkpoint's score on the same images may change with the processor or number format:
# a number of images or a share of them, and a difference in loss.
OTHER_IMAGES, OTHER_SHARE, OTHER_LOSS = 2, 0.01, 0.02


def stage2(
    *,
    prepared: Path,
    stage1: Path,
    out: Out,
    image_size: Auto | Annotated[int, Interval(ge=16, le=2048)],
    batchnorm: Literal["frozen", "train"],
    interpolate: bool,
    stop: Stop,
    recipe: Recipe,
    how: Augment,
    weighing: SampleWeights,
    precision: Annotated[Precision, Key("precision")],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Load stage 1's checkpoint strictly, train every parameter, and keep an epoch.

    Its weights may then be interpolated with stage 1's (WiSE-FT, Wortsman et al. 2022, arXiv
    2109.01903): by a factor that is clearly better on validation than stage 2's end, or with
    `keep: best` by the best one. Factor 0 means stage 2 didn't help.

    Writes model.safetensors, history.csv, interpolation.csv and metrics.json.

    Raises CheckpointError if stage 1's checkpoint holds other weights than stage 1 wrote, was
    validated on other images or labels, or its score differs by more than rounding explains.
    """
    set_up_torch()
    packed = read_facts(prepared)
    refuse_larger("stage2", image_size, packed.size)
    refuse_shared_statistics("stage2", batchnorm)
    network, meta = load(stage1, resolved(precision))
    refuse_other_classes("stage1", stage1, network.classes, packed.classes)
    (rows, val_rows), (images, val_images) = read_splits(prepared, ("train", "val"))

    _refuse_other_contents(meta, network, val_images.key_with(val_rows.labels), stage1)

    if doubt := undefined(stop.measure, val_rows.labels, packed.classes, "validation"):
        say(doubt)

    def validate() -> Validation:
        scores = logits(network, val_images, TTA("none", 1))
        return validation(scores, val_rows.labels, measure=stop.measure)

    before = [validate()]
    _refuse_other_score(before[0], meta, stage1, len(val_images))
    size = input_size(network.model, image_size, packed.size, STAGE_2_AT)
    if size != network.image_size:
        sizes = f"{network.image_size} to {size} px"
        network.take(size)
        before.append(validate())
        gain = before[1]["accuracy"] - before[0]["accuracy"]
        say(f"from {sizes}, before training: {100 * gain:+.1f} points on validation")
    say(f"epoch   0  val {in_words(before[-1], stop.measure)}")

    feed = DeviceImages(images, network.device)
    start_state = state_of(network.model)
    freeze_all_but(network.model, everything(network.model), batchnorm)

    def batch(epoch: int, chosen: NDArray[np.int64]) -> Tensor:
        return network.normalise(augment(feed(chosen), rows.ids[chosen], epoch, seed, how))

    start = time.perf_counter()
    resume_state = ResumeState(resume.folder / "training.safetensors")
    epochs_run = fit(
        network.model,
        network.model,
        batch,
        rows.labels,
        training_weights(rows.labels, rows.weights, len(packed.classes), weighing),
        recipe,
        seed,
        resume_state,
    )
    run = ("stage2", out, network.model, epochs_run, validate, before, stop, resume_state)
    best = best_epoch(*run, len(val_images))
    seconds = time.perf_counter() - start

    curve = [(1.0, best.val)]
    if interpolate:
        inner = interpolation(network.model, start_state, best.state, validate, resume)
        curve = [(0.0, before[-1]), *inner, *curve]
    factor, val = choose_factor(curve, stop, len(val_images))
    network.model.load_state_dict(between(start_state, best.state, factor))
    names = ("accuracy", "loss", *own_column(stop.measure))
    lines = [(f"{f:.2f}", *(f"{v[n]:.6f}" if n in v else "" for n in names)) for f, v in curve]
    write_csv(out / "interpolation.csv", [("factor", *(f"val_{n}" for n in names)), *lines])
    said = "stage 2 didn't help" if factor == 0 else f"val acc {val['accuracy']:.4f}"
    say(f"interpolated from stage 1 to stage 2 by factor {factor:.2f}: {said}")
    ran = sum(1 for _ in (out / "history.csv").open()) - 1 - len(before)
    write_metrics(
        out,
        "stage2",
        val,
        epochs=ran,
        best_epoch=best.epoch,
        factor=factor,
        # Before training, at stage 2's size: the difference to stage 1's is that of the size.
        start_accuracy=before[-1]["accuracy"],
    )
    network.save(
        out / "model.safetensors",
        epoch=best.epoch,
        train_accuracy=best.train_accuracy,
        val_accuracy=val["accuracy"],
        val=val,
        factor=factor,
        versions=versions(),
    )
    return {"epochs_seconds": seconds}


def _refuse_other_contents(
    meta: dict[str, Any], network: Network, val_images: str, file: Path
) -> None:
    """Refuse weights or validation images that aren't bit for bit those of stage 1."""
    tensors = {name: t.cpu().numpy() for name, t in network.model.state_dict().items()}
    for what, found, said in (
        ("weights", checkpoint.digest(tensors), meta.get("weights_sha256")),
        ("validation images and labels", val_images, meta.get("val_images")),
    ):
        if found != said:
            raise CheckpointError(
                f"{file}: the {what} have SHA-256 {found[:12]}..., stage 1 had "
                f"{str(said)[:12]}...; run `dvc repro -f stage1`"
            )


def _refuse_other_score(val: Validation, meta: dict[str, Any], file: Path, n: int) -> None:
    """Refuse a score that another processor or number format doesn't explain."""
    said: Validation = meta["val"]
    images = max(OTHER_IMAGES, OTHER_SHARE * n)
    off = abs(val["accuracy"] - said["accuracy"]) * n
    if off > images + 1e-6 or not abs(val["loss"] - said["loss"]) <= OTHER_LOSS:
        raise CheckpointError(
            f"{file}: scores {val['accuracy']:.4f} (loss {val['loss']:.4f}) on validation, stage 1 "
            f"had {said['accuracy']:.4f} ({said['loss']:.4f}); run `dvc repro -f stage1`"
        )
