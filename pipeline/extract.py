"""Extract: CNN codes of all images at several depths of the frozen, pretrained network."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from pipeline.images.augment import Flips
from pipeline.images.shards import SPLITS, Images, read_facts, read_splits, refuse_larger
from pipeline.inference.taps import Pooling, Taps
from pipeline.inference.tta import TTA, Run, averaged
from pipeline.nets import blocks
from pipeline.nets.automatic import usual_size
from pipeline.nets.backbone import licence_of, pretrained
from pipeline.nets.batches import run_in_batches
from pipeline.nets.device import set_up_torch
from pipeline.nets.fuse import Precision, resolved
from pipeline.nets.network import Network, for_images
from pipeline.nets.tokens import layout_of
from pipeline.probing.codes import LAST, SOURCE, codes_name, write_labels
from pipeline.stage_runtime.distributed import Arrays
from pipeline.stage_runtime.errors import ParamError
from pipeline.stage_runtime.files import link, whole_folder, write_json
from pipeline.stage_runtime.progress import say, track
from pipeline.stage_runtime.resume import Resume
from pipeline.stage_runtime.schema import Auto, Key, Out, Seed


def extract(
    *,
    prepared: Path,
    out: Out,
    image_size: Auto | Annotated[int, Interval(ge=16, le=2048)],
    views: Annotated[int, Interval(ge=1, le=8)],
    depths: Literal["auto"] | list[str],
    pooling: Pooling,
    flips: Annotated[Flips, Key("flips")],
    name: Annotated[str, Key("backbone.name")],
    weights: Annotated[str, Key("backbone.weights")],
    sha256: Annotated[str, Key("backbone.sha256")],
    precision: Annotated[Precision, Key("precision")],
    seed: Seed,
    resume: Resume,
) -> dict[str, float]:
    """Run every image through the frozen network and store its pooled activations.

    The depths include the head's input and the head's output, the logits of the source's classes.

    The codes are averaged over up to `views` flips of the image, in all splits.

    Writes {split}-{depth}.npy (N, D), facts.json, and labels.csv with the labels of train and val,
    not of test.

    Raises ParamError for a wrong size, network or depth, WeightsError for wrong weights.
    """
    set_up_torch()
    packed = read_facts(prepared)
    refuse_larger("extract", image_size, packed.size)
    model, backbone = pretrained(name, weights, sha256, seed, say)
    if weights != "none":
        say(f"weights: {weights} of {name}; their licence: {licence_of(name, weights)}")
    chosen = (
        blocks.depths(model) if depths == "auto" else blocks.match(model, depths, "extract.depths")
    )
    model.eval().requires_grad_(False)
    network = for_images(model, backbone, packed, image_size, resolved(precision))
    if image_size == "auto" and network.image_size < (own := usual_size(model)):
        say(
            f"{name} was made for {own} px, and sees {network.image_size}: prepare.size is "
            f"{packed.size}"
        )
    shapes = {call.name: call.shape for call in blocks.trace(model, network.image_size)}
    for depth in chosen:
        if layout_of(shapes.get(depth, ())) is None:
            raise ParamError(f"extract.depths: {depth} outputs no feature maps; choose a block")
    labelled, of_split = read_splits(prepared, ("train", "val"), ("test",))
    seconds, n_images = 0.0, 0
    with whole_folder(out) as folder, Taps(network.model, [*chosen, LAST, SOURCE], pooling) as taps:
        for split, images in zip(SPLITS, of_split, strict=True):
            start = time.perf_counter()
            run = averaged(network, taps, TTA(flips, views))
            n_images += _extract(network, run, taps.depths, images, split, resume, folder)
            seconds += time.perf_counter() - start
        of_codes = {"depths": taps.depths, "pooling": pooling}
        tta = {"viewing": asdict(TTA(flips, views))}
        write_json(folder / "facts.json", {**network.facts(), **of_codes, **tta})
        write_labels(folder / "labels.csv", dict(zip(("train", "val"), labelled, strict=True)))
    return {"images_per_second": n_images / seconds} if n_images else {}


def _extract(
    network: Network,
    run: Run,
    depths: Sequence[str],
    images: Images,
    split: str,
    resume: Resume,
    out: Path,
) -> int:
    """Write a split's codes at all depths to `out`; return the number of images computed."""
    names = [codes_name(split, depth) for depth in depths]
    n, begun = len(images), 0

    def codes(first: int) -> Iterable[Arrays]:
        nonlocal begun
        begun = first
        outputs = run_in_batches(images, network, run, first)
        return track(outputs, n - first, f"codes {split}", width=lambda part: len(part[0]))

    resume.filled(names, n, codes)
    for name in names if n else []:
        link(resume.file(name), out / f"{name}.npy")
    return n - begun
