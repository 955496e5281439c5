"""Stage 1: train the top layers and a new head, initialised from the probe; the rest is frozen."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval

from pipeline.images.augment import Augment
from pipeline.images.shards import read_facts, read_splits, refuse_larger
from pipeline.nets.batches import in_batches
from pipeline.nets.checkpoint import versions
from pipeline.nets.device import set_up_torch
from pipeline.nets.device_images import DeviceImages
from pipeline.nets.fuse import Precision, resolved
from pipeline.scoring.metrics import undefined, validation
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Auto, Key, Out, Seed
from pipeline.training.best_epoch import Stop, Validation, best_epoch, in_words
from pipeline.training.cut import cut_below
from pipeline.training.fit import Recipe, SampleWeights, fit, training_weights
from pipeline.training.freeze import freeze_all_but, refuse_shared_statistics
from pipeline.training.head import fit_head, head_views
from pipeline.training.resume_state import ResumeState
from pipeline.training.start import start_network, what_trains
from pipeline.training.trunk_cache import TrunkOutputs


def stage1(
    *,
    prepared: Path,
    probe: Path,
    out: Out,
    unfreeze: Auto | list[str],
    head_init: Literal["probe", "random"],
    image_size: Auto | Annotated[int, Interval(ge=16, le=2048)],
    views: Annotated[int, Interval(ge=0, le=64)],
    batchnorm: Literal["frozen", "train"],
    stop: Stop,
    recipe: Recipe,
    how: Augment,
    weighing: SampleWeights,
    precision: Annotated[Precision, Key("precision")],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Train the new head and the unfrozen modules on top of the frozen trunk.

    Without pretrained weights, everything trains for the same number of epochs, and BatchNorm uses
    batch statistics.

    The trunk runs once for each of `views` augmentations of each image, and the epochs cycle
    through them; with 0 views, each epoch augments anew. The last epoch is kept, or the best
    one by validation.

    Writes model.safetensors, history.csv and metrics.json.
    """
    set_up_torch()
    torch.manual_seed(seed)
    packed = read_facts(prepared)
    refuse_larger("stage1", image_size, packed.size)
    network, of_probe = start_network(probe, packed, image_size, head_init, resolved(precision))
    trained = what_trains(network, unfreeze)
    if network.backbone.weights == "none":
        say("from scratch (backbone.weights: none): everything trains, with batch statistics")
        batchnorm = "train"
    refuse_shared_statistics("stage1", batchnorm)
    trainable = freeze_all_but(network.model, trained, batchnorm)
    cut = cut_below(network.model, trained, network.image_size)
    say(f"training {len(trainable)} tensors in {', '.join(trained)}; frozen below {cut.name}")

    (rows, val_rows), (images, val_images) = read_splits(prepared, ("train", "val"))
    feed = DeviceImages(images, network.device)
    outputs = TrunkOutputs(network, cut)
    start = time.perf_counter()
    batch = outputs.augmented(images, feed, rows.ids, how, views, seed)
    val_batch = outputs.flipped(
        val_images, DeviceImages(val_images, network.device), 1, "trunk val"
    )
    trunk_seconds = time.perf_counter() - start

    if doubt := undefined(stop.measure, val_rows.labels, packed.classes, "validation"):
        say(doubt)

    def validate() -> Validation:
        network.model.eval()
        with torch.no_grad():
            parts = in_batches(
                len(val_images), lambda chosen: [cut.top(val_batch(1, chosen)).cpu().numpy()]
            )
            scores = np.concatenate([part for (part,) in parts])
        return validation(scores, val_rows.labels, measure=stop.measure)

    from_probe = head_init == "probe" and network.backbone.weights != "none"
    refit = from_probe and network.image_size != of_probe["image_size"]
    if refit:
        n_views = head_views(how.flips, len(images))
        whole = outputs.flipped(images, feed, n_views, "trunk whole")
        fit_head(network, cut, whole, n_views, rows, weighing, of_probe["linear"]["c"], resume)
    resume_state = ResumeState(resume.folder / "training.safetensors")
    epochs_run = fit(
        network.model,
        cut.top,
        batch,
        rows.labels,
        training_weights(rows.labels, rows.weights, len(packed.classes), weighing),
        recipe,
        seed,
        resume_state,
    )
    before = validate()
    about = _about_the_head(of_probe, network.image_size, refit) if from_probe else ""
    say(f"epoch   0  val {in_words(before, stop.measure)}{about}")
    best = best_epoch(
        *("stage1", out, network.model, epochs_run, validate, [before], stop, resume_state),
        len(val_images),
        start_counts=True,  # the probe's head may be the best there is
    )
    if best.epoch == 0:
        say("the initial head from the probe is better, and kept")
    network.save(
        out / "model.safetensors",
        epoch=best.epoch,
        train_accuracy=best.train_accuracy,
        val_accuracy=best.val["accuracy"],
        val=best.val,
        val_images=val_images.key_with(val_rows.labels),
        trained=trained,
        flips=how.flips,
        versions=versions(),
    )
    return {
        "trunk_seconds": trunk_seconds,
        "epochs_seconds": time.perf_counter() - start - trunk_seconds,
    }


def _about_the_head(of_probe: dict[str, Any], image_size: int, anew: bool) -> str:
    """Describe the probe's head and its accuracy on the codes."""
    was, size = of_probe["val"]["accuracy"], of_probe["image_size"]
    fitted = f"fitted anew at {image_size} px" if anew else f"at {image_size} px"
    return f": the probe's head, {fitted} ({was:.4f} on the codes of {size} px)"
