"""Compare the forward pass in this processor's number format with PyTorch's in fp32.

    python -m bench.formats                       # five networks at their own sizes
    python -m bench.formats --rounds 1 --batches 2 --networks timm/resnet50    # a quick look

The weights are drawn: they don't change the speed. "Eager" is the network as PyTorch runs it, in
fp32, in its own process with PyTorch's defaults; "forward" is the one that `extract` runs, without
its loop. They take turns within a round; the median of the rounds' ratios is printed with the
lowest and the highest.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from bench.networks import network
from bench.ratios import say_ratios, seconds
from pipeline.inference.taps import Taps
from pipeline.inference.tta import TTA, averaged
from pipeline.nets.backbone import pretrained
from pipeline.nets.batches import EVAL_BATCH, run_in_batches
from pipeline.nets.blocks import depths
from pipeline.nets.device import set_up_torch
from pipeline.nets.fuse import resolved
from pipeline.nets.network import Network
from pipeline.probing.codes import LAST
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import threads

NETWORKS = (
    "timm/vit_small_patch16_224",
    "timm/convnext_tiny",
    "timm/resnet50",
    "timm/mobilenetv4_conv_medium",
    "timm/hgnetv2_b2",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="of 32 images, in a turn")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    options = parser.parse_args()
    set_up_torch()
    spawn = multiprocessing.get_context("spawn")
    for name in options.networks:
        ours = network(name)
        here, there = spawn.Pipe()
        process = spawn.Process(
            target=eager, args=(there, name, ours.image_size, options.batches), daemon=True
        )
        process.start()
        rounds = [measured(ours, here, options.batches) for _ in range(options.rounds)]
        here.send(False)
        process.join()
        say_ratios(rounds, f", {name} at {ours.image_size} px")
    say(f"{threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {resolved('auto')}")


def eager(connection: Connection, name: str, size: int, batches: int) -> None:
    """Time a batch through the network as PyTorch runs it, whenever asked."""
    torch.set_num_threads(threads())
    model = pretrained(name, "none", "", seed=0)[0].eval()
    x = torch.rand(EVAL_BATCH, 3, size, size)
    with torch.inference_mode():
        while connection.recv():
            connection.send(seconds(lambda: model(x), batches))


def measured(ours: Network, connection: Connection, batches: int) -> dict[str, float]:
    """Take one round: eager, the bare forward pass, and extract's loop."""
    connection.send(True)
    theirs = connection.recv()
    rng = np.random.default_rng(0)
    shape = (batches * EVAL_BATCH, ours.packed_size, ours.packed_size, 3)
    images = rng.integers(256, size=shape, dtype=np.uint8)
    x = ours.normalise(torch.from_numpy(images[:EVAL_BATCH]))
    with torch.inference_mode():
        bare = seconds(lambda: ours.model(x), batches)
    with Taps(ours.model, [*depths(ours.model), LAST], "both") as taps:
        run = averaged(ours, taps, TTA("none", 1))
        for _ in run_in_batches(images[:EVAL_BATCH], ours, run):
            pass
        start = time.perf_counter()
        for _ in run_in_batches(images, ours, run):
            pass
        looped = (time.perf_counter() - start) / batches
    return {"eager fp32 / forward": theirs / bare, "forward / extract's loop": bare / looped}


if __name__ == "__main__":
    main()
