"""Compare the speed of the stages' computations with the bare network and with the usual loop.

    python -m bench.ratios                           # after `dvc repro probe`
    python -m bench.ratios --rounds 1 --images 64 --times 1    # a quick look

It runs on the first training images of data/prepared. The compared programs take turns within a
round, and a ratio is taken within a round; the median over rounds is printed with the lowest and
the highest ratio. The time before the slash is divided by the time after it. Code that isn't ours
runs in its own process with PyTorch's defaults: our set-up reuses freed memory, which would speed
it up too.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bench.peers import loaders
from pipeline.images.augment import Augment, augment
from pipeline.images.shards import read_facts, read_images, read_rows
from pipeline.inference.taps import Taps
from pipeline.inference.tta import TTA, averaged
from pipeline.nets.backbone import rebuild, set_head
from pipeline.nets.batches import EVAL_BATCH, run_in_batches
from pipeline.nets.blocks import depths
from pipeline.nets.convolve import convolve, shape_of
from pipeline.nets.device import set_up_torch
from pipeline.nets.fuse import resolved
from pipeline.nets.network import Network
from pipeline.probing.codes import LAST, SOURCE
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import threads
from pipeline.training.cut import cut_below
from pipeline.training.fit import Recipe, fit
from pipeline.training.freeze import everything, freeze_all_but
from pipeline.training.start import start_network, what_trains
from pipeline.training.trunk_cache import cached_outputs, key_of

Ints = NDArray[np.int64]
Images = NDArray[np.uint8]

PREPARED, PROBE = Path("data/prepared"), Path("models/probe/probe.safetensors")
BATCH, WHOLE, SMALL, EPOCHS, VIEWS = 32, 224, 160, 20, 8
FLIPS = Augment("dihedral", 1.0, 0.0)
TOPS = (["conv_head", "bn2"], ["blocks.5", "blocks.6", "conv_head", "bn2"])
TURN = 8 * BATCH  # images per turn, if two loops take turns


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, help="to measure on so many of the training images")
    parser.add_argument("--times", type=int, default=8, help="how often a single batch is timed")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    set_up_torch()
    images = read_images(PREPARED, "train")[: options.images]
    rounds, times = [], options.times
    bare = Bare(times)
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        found = {**forwards(images, bare, times), **steps(images, bare, times)}
        found |= depthwise_gradients(times)
        for top in TOPS:
            found |= first_stage(images, top, bare)
        rounds.append(found)
    bare.end()
    say(f"{threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {len(images)} images")
    by_name = say_ratios(rounds)
    if options.json:
        options.json.write_text(json.dumps(by_name, indent=2) + "\n")


def say_ratios(rounds: Sequence[dict[str, float]], of: str = "") -> dict[str, list[float]]:
    """Print each ratio's median, lowest and highest over the rounds; return them by name."""
    by_name = {name: [r[name] for r in rounds] for name in rounds[0]}
    for name, ratios in by_name.items():
        say(f"{median(ratios):7.2f}  ({min(ratios):.2f} to {max(ratios):.2f})  {name}{of}")
    return by_name


class Bare:
    """A process that times code that isn't ours; a single batch is timed `times` times."""

    def __init__(self, times: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, other = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(other, times))
        self.process.start()

    def __call__(self, name: str, *arguments: object) -> float:
        """Run one of its functions; return the seconds."""
        self.connection.send((name, arguments))
        found: float = self.connection.recv()
        return found

    def end(self) -> None:
        """End the process."""
        self.connection.send(("", ()))
        self.process.join()


def serve(connection: Connection, times: int) -> None:
    """Time the requested functions, in a process with PyTorch's defaults."""
    torch.set_num_threads(threads())
    known: dict[str, Callable[..., float]] = {
        "forward": partial(bare_forward, times),
        "folded": partial(folded_forward, times),
        "step": partial(bare_step, times),
        "epoch": usual_epoch,
    }
    while True:
        name, arguments = connection.recv()
        if not name:
            return
        connection.send(known[name](*arguments))


def bare_forward(times: int) -> float:
    """Time the network's forward pass on a batch, as in the tutorial."""
    plain, x = unfolded(), torch.rand(BATCH, 3, WHOLE, WHOLE)
    with torch.inference_mode():
        return seconds(lambda: plain(x), times)


def folded_forward(times: int) -> float:
    """Time the folded network's forward pass on a batch."""
    ours = network(WHOLE)
    ours.model.requires_grad_(False)
    x = ours.normalise(255 * torch.rand(BATCH, WHOLE, WHOLE))
    with torch.inference_mode():
        return seconds(lambda: ours.model(x), times)


def bare_step(times: int) -> float:
    """Time a step of the whole network, in the fastest of two layouts and all number formats."""
    found = []
    y = torch.from_numpy(read_rows(PREPARED, "train").labels[:BATCH])
    for layout in (torch.contiguous_format, torch.channels_last):
        for low in (False, True) if resolved("auto") == "bf16" else (False,):
            plain = unfolded()
            plain.to(memory_format=layout)  # type: ignore[call-overload]  # of modules too
            freeze_all_but(plain, everything(plain), "frozen")
            x = torch.rand(BATCH, 3, SMALL, SMALL).contiguous(memory_format=layout)

            def forward(x: Tensor, plain: nn.Module = plain, low: bool = low) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    logits: Tensor = plain(x)
                return logits.float()

            found.append(seconds(step(plain, forward, x, y), times))
    return min(found)


def usual_epoch(n: int, trained: list[str]) -> float:
    """Time the tutorial's epoch on `n` image files, with all but some modules frozen.

    The batch size is 32, which favours it: the tutorial uses four.
    """
    data = loaders(BATCH)[0]["train"]
    some = Subset(data.dataset, range(n))
    plain = unfolded()
    freeze_all_but(plain, trained, "frozen")
    optimizer = torch.optim.SGD(
        [p for p in plain.parameters() if p.requires_grad], lr=0.001, momentum=0.9
    )
    plain.train()
    start = time.perf_counter()
    for x, y in DataLoader(some, BATCH, shuffle=True, num_workers=data.num_workers):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - start


def forwards(images: Images, bare: Bare, times: int) -> dict[str, float]:
    """Compare extract's loop, the bare folded network, and the network as PyTorch runs it."""
    plain, tapped = network(WHOLE), network(WHOLE)
    for ours in (plain, tapped):
        ours.model.requires_grad_(False)  # as extract does
    eager, unkept, folded = bare("forward"), bare("folded"), folded_forward(times)
    x = plain.normalise(torch.tensor(images[:BATCH]))
    passes, extracted = 0.0, 0.0
    with Taps(tapped.model, [*depths(tapped.model), LAST, SOURCE], "both") as taps:
        run = averaged(tapped, taps, TTA("none", 1))
        # In turns of some batches, so that other load on the machine affects both; the first two
        # turns only warm up.
        parts = [images[start : start + TURN] for start in range(0, len(images), TURN)]
        for number, part in enumerate([*parts[:2], *parts]):
            start = time.perf_counter()
            with torch.inference_mode():
                for _ in range(-(-len(part) // EVAL_BATCH)):
                    plain.model(x)
            middle = time.perf_counter()
            for _ in run_in_batches(part, tapped, run):
                pass
            if number >= len(parts[:2]):
                passes += middle - start
                extracted += time.perf_counter() - middle
    return {
        "bare folded forward / extract's loop, 224 px": passes / extracted,
        "eager fp32 forward / bare folded forward, 224 px": eager / folded,
        "folded forward, memory given back / kept, 224 px": unkept / folded,
    }


def first_stage(images: Images, top: list[str], bare: Bare) -> dict[str, float]:
    """Compare stage 1 with the usual loop, and with its passes and steps alone."""
    usual = bare("epoch", len(images), what_trains(network(SMALL), top))
    whole, limit = first_stage_seconds(images, top)
    name = f"stage 1, {EPOCHS} epochs, {VIEWS} views, {' '.join(top)}"
    return {
        f"the tutorial's loop / {name}": EPOCHS * usual / whole,
        f"{name} / its passes and steps": whole / limit,
    }


def first_stage_seconds(images: Images, top: list[str]) -> tuple[float, float]:
    """Time stage 1 from packed images on, and its passes and steps alone on prepared input."""
    rows = read_rows(PREPARED, "train")
    labels, ids, ones = rows.labels[: len(images)], rows.ids, np.ones(len(images))
    ours = network(SMALL)
    trained = what_trains(ours, top)
    freeze_all_but(ours.model, trained, "frozen")
    cut = cut_below(ours.model, trained, ours.image_size)

    @torch.no_grad()
    def trunk_of(epochs: Sequence[int], chosen: Ints) -> list[Tensor]:
        pixels = ours.shrink(torch.from_numpy(images[chosen]))
        augmented = (augment(pixels, ids[chosen], epoch, 0, FLIPS) for epoch in epochs)
        return [cut.trunk(ours.normalise(x)) for x in augmented]

    with tempfile.TemporaryDirectory() as folder:
        os.environ["PIPELINE_CACHE"] = folder  # an empty cache: nothing is computed already
        start = time.perf_counter()
        key = key_of(ours, cut.name, read_images(PREPARED, "train").key)
        batch = cached_outputs(trunk_of, len(images), VIEWS, key, "trunk")
        for _ in fit(ours.model, cut.top, batch, labels, ones, recipe(), 0):
            pass
        whole = time.perf_counter() - start
        z = batch(1, np.arange(BATCH)).clone()
    x, y = ours.normalise(torch.tensor(images[:BATCH])), torch.tensor(labels[:BATCH])
    once = step(ours.model, cut.top, z, y)
    once()
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(VIEWS * -(-len(images) // BATCH)):
            cut.trunk(x)
    for _ in range(EPOCHS * (len(images) // BATCH)):
        once()
    return whole, time.perf_counter() - start


def steps(images: Images, bare: Bare, times: int) -> dict[str, float]:
    """Compare stage 2's step, from packed pixels on, with the best bare one on prepared input."""
    rows = read_rows(PREPARED, "train")
    y = torch.from_numpy(rows.labels[:BATCH])
    ours = network(SMALL)
    freeze_all_but(ours.model, everything(ours.model), "frozen")

    def from_pixels(number: Tensor) -> Tensor:
        chosen = np.arange(BATCH)
        pixels = augment(torch.from_numpy(images[chosen]), rows.ids[chosen], 1, 0, FLIPS)
        logits: Tensor = ours.model(ours.normalise(pixels))
        return logits

    own = seconds(step(ours.model, from_pixels, torch.empty(0), y), times)
    return {"the best bare eager step / stage 2's step, 160 px": bare("step") / own}


def depthwise_gradients(times: int) -> dict[str, float]:
    """Compare oneDNN's gradients of a depthwise convolution with ours, in bfloat16.

    Returns nothing if the processor doesn't support bfloat16.
    """
    if resolved("auto") != "bf16":
        return {}
    ratios = {}
    for kernel, stride, size, channels in ((5, 1, 10, 672), (3, 2, 80, 96)):
        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        x = torch.randn(BATCH, channels, size, size).to(torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = conv.weight.detach().to(torch.bfloat16).requires_grad_()
        shape = shape_of(conv, (size, size))
        y = F.conv2d(x, weight, None, stride, kernel // 2, groups=channels)
        dy, own = torch.randn_like(y), convolve(x, weight, None, shape, "none")

        def gradients(y: Tensor, dy: Tensor = dy, of: tuple[Tensor, ...] = (x, weight)) -> object:
            return torch.autograd.grad(y, of, dy, retain_graph=True)

        theirs = seconds(partial(gradients, y), times)
        ours = seconds(partial(gradients, own), times)
        name = f"{kernel} x {kernel} on {size} x {size} x {channels}, stride {stride}"
        ratios[f"oneDNN's depthwise gradients / ours, {name}, bf16"] = theirs / ours
    return ratios


def network(size: int) -> Network:
    """Build the network that stages 1 and 2 start from."""
    found, _ = start_network(PROBE, read_facts(PREPARED), size, "probe", resolved("auto"))
    found.model.eval()
    return found


def unfolded() -> nn.Module:
    """Build the same network as PyTorch runs it."""
    model = rebuild(network(WHOLE).backbone)
    set_head(model, len(read_facts(PREPARED).classes))
    return model.eval()


def recipe() -> Recipe:
    """Return stage 1's recipe with the number of epochs in the comparison."""
    numbers = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 5e-4, "layer_decay": 0.9}
    more = {"weight_decay": 0.01, "momentum": 0.9, "warmup_epochs": 1.0, "step_epochs": 7}
    kinds = {"optimizer": "adamw", "schedule": "cosine", "gamma": 0.1}
    averaged = {"label_smoothing": 0.0, "average_epochs": 1.0}
    return Recipe(**numbers, **more, **kinds, **averaged)  # type: ignore[arg-type]


def step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> Callable[[], None]:
    """Return a function that runs one step of training: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model.train()

    def once() -> None:
        F.cross_entropy(forward(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return once


def seconds(run: Callable[[], object], times: int) -> float:
    """Return the median time of `times` runs, after two runs as warm-up."""
    taken = []
    for number in range(times + 2):
        start = time.perf_counter()
        run()
        if number > 1:
            taken.append(time.perf_counter() - start)
    return median(taken)


if __name__ == "__main__":
    main()
