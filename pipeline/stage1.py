"""Stage 1: a new head, from the probe, and the top layers; everything below stays frozen."""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.images.augment import Augment, Flips, augment
from pipeline.images.pack import Facts, read_facts, read_images, read_rows
from pipeline.learn.fit import Recipe, fit, training_weights
from pipeline.learn.keep_best import Validation, keep_best
from pipeline.learn.metrics import validation
from pipeline.learn.probes import head_of, read_probes
from pipeline.learn.schedule import Schedule
from pipeline.nets.backbone import again, head_name, set_head
from pipeline.nets.blocks import match, trained_with
from pipeline.nets.cut import cut_below
from pipeline.nets.fold import Precision, fold, resolved
from pipeline.nets.freeze import freeze_all_but
from pipeline.nets.network import Network, backbone_of, batches, refuse_larger, versions
from pipeline.nets.stored import Batch, stored
from pipeline.progress import say
from pipeline.runtime import cache_folder, threads
from pipeline.stage import Key, Seed, main


def stage1(
    *,
    prepared: Path,
    probe: Path,
    out: Path,
    unfreeze: list[str],
    head_init: Literal["probe", "random"],
    image_size: Annotated[int, Interval(ge=16, le=2048)],
    views: Annotated[int, Interval(ge=0, le=64)],
    batchnorm: Literal["frozen", "train"],
    epochs: Annotated[int, Ge(1)],
    patience: Annotated[int, Ge(0)],
    batch_size: Annotated[int, Ge(2)],
    optimizer: Literal["adamw", "sgd"],
    lr: Annotated[float, Gt(0)],
    layer_decay: Annotated[float, Interval(gt=0, le=1)],
    weight_decay: Annotated[float, Ge(0)],
    momentum: Annotated[float, Interval(ge=0, lt=1)],
    schedule: Schedule,
    warmup_epochs: Annotated[float, Ge(0)],
    step_epochs: Annotated[int, Ge(1)],
    gamma: Annotated[float, Interval(gt=0, le=1)],
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)],
    flips: Annotated[Flips, Key("flips")],
    crop: Annotated[float, Key("augment.crop"), Interval(gt=0, le=1)],
    light: Annotated[float, Key("augment.light"), Interval(ge=0, lt=1)],
    sample_weight: Annotated[bool, Key("sample_weight")],
    class_weight: Annotated[Literal["none", "balanced"], Key("class_weight")],
    precision: Annotated[Precision, Key("precision")],
    seed: Seed,
) -> dict[str, float]:
    """Train the new head and the unfrozen modules on top of the frozen trunk.

    The trunk runs once for each of `views` augmentations of each image, and the epochs take turns
    with them; 0 views augment anew each epoch. The best validation epoch is kept.

    Writes model.safetensors, history.csv and metrics.json.
    """
    torch.set_num_threads(threads())
    torch.manual_seed(seed)
    packed = read_facts(prepared)
    refuse_larger("stage1", image_size, packed.size)
    network = _new_network(probe, packed, image_size, head_init, resolved(precision))
    trained = trained_with(network.model, match(network.model, unfreeze, "stage1.unfreeze"))
    trainable = freeze_all_but(network.model, trained, batchnorm)
    cut = cut_below(network.model, trained)
    say(f"training {len(trainable)} tensors in {', '.join(trained)}; frozen below {cut.name}")

    rows, val_rows = read_rows(prepared, "train"), read_rows(prepared, "val")
    images, val_images = read_images(prepared, "train"), read_images(prepared, "val")
    how = Augment(flips, crop, light)

    def trunk_of(epoch: int, chosen: NDArray[np.int64]) -> Tensor:
        with torch.no_grad():
            pixels = torch.from_numpy(images[chosen])
            return cut.trunk(network.normalise(augment(pixels, rows.ids[chosen], epoch, seed, how)))

    def val_trunk_of(epoch: int, chosen: NDArray[np.int64]) -> Tensor:
        with torch.no_grad():
            return cut.trunk(network.normalise(torch.from_numpy(val_images[chosen])))

    weights = rows.weights if sample_weight else np.ones(len(rows.labels))
    recipe = Recipe(
        epochs,
        batch_size,
        optimizer,
        lr,
        layer_decay,
        weight_decay,
        momentum,
        schedule,
        warmup_epochs,
        step_epochs,
        gamma,
        label_smoothing,
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=cache_folder()) as cache:
        batch: Batch = trunk_of
        if views:
            batch = stored(trunk_of, len(images), views, Path(cache) / "train", "trunk train")
        val_batch = stored(val_trunk_of, len(val_images), 1, Path(cache) / "val", "trunk val")
        trunk_seconds = time.perf_counter() - start

        def validate() -> Validation:
            network.model.eval()
            with torch.no_grad():
                parts = [cut.top(val_batch(1, chosen)) for chosen in batches(len(val_images))]
            return validation(torch.cat(parts)[: len(val_images)].numpy(), val_rows.labels)

        epochs_run = fit(
            network.model,
            cut.top,
            batch,
            rows.labels,
            training_weights(rows.labels, weights, len(packed.classes), class_weight),
            recipe,
            seed,
        )
        best = keep_best("stage1", out, network.model, epochs_run, validate, [validate()], patience)
    network.save(
        out / "model.safetensors",
        epoch=best.epoch,
        train_accuracy=best.train_accuracy,
        val_accuracy=best.val["accuracy"],
        val=best.val,
        trained=trained,
        flips=flips,
        versions=versions(),
    )
    return {
        "trunk_seconds": trunk_seconds,
        "epochs_seconds": time.perf_counter() - start - trunk_seconds,
    }


def _new_network(
    file: Path, packed: Facts, image_size: int, head_init: str, precision: Literal["fp32", "bf16"]
) -> Network:
    """Build the pretrained network that made the codes, with a head for the classes at hand."""
    _, linear, meta = read_probes(file)
    backbone = backbone_of(meta)
    if meta["classes"] != packed.classes:
        raise CheckpointError(
            f"{file}: its classes {meta['classes']} aren't those of the images, {packed.classes}; "
            "run `dvc repro probe`"
        )
    model = again(backbone)
    set_head(model, len(packed.classes))
    if head_init == "probe":
        weight, bias = head_of(linear)
        head = model.get_submodule(head_name(model))
        head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return Network(
        fold(model, precision),
        backbone,
        packed.classes,
        image_size,
        packed.size,
        packed.fit,
        packed.channels,
        precision,
    )


if __name__ == "__main__":
    main(stage1)
