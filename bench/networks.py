"""Write the table of recommended networks for docs/backbones.md.

    python -m bench.networks              # parameters, licences, and the speed on this machine
    python -m bench.networks --rounds 1 --first 3   # a quick look

The speed is that of a network's forward pass as `extract` runs it, at the size that `auto` means
for packed images of 224 pixels. It doesn't depend on the weights, which are drawn. The networks
take turns in each round; the table has the median. Accuracies on ImageNet are published ones:
results/results-imagenet.csv of huggingface/pytorch-image-models (commit 0173a13), or model cards.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from pipeline.images.shards import Facts
from pipeline.nets.automatic import input_size
from pipeline.nets.backbone import PACKAGED, licence_of, pretrained, skeleton
from pipeline.nets.batches import EVAL_BATCH
from pipeline.nets.device import set_up_torch
from pipeline.nets.fuse import resolved
from pipeline.nets.network import Network, for_images
from pipeline.stage_runtime.progress import say, track
from pipeline.stage_runtime.settings import threads

PACKED = 224  # pixels
LEAST_SECONDS = 1.0  # of one measurement


@dataclass(frozen=True)
class Recommended:
    """A network that is worth a try, and what is published about it."""

    name: str
    top1: str  # on ImageNet's validation images, in percent, and the size of their sides


NO_CLASSIFIER = "has no classifier"
RECOMMENDED = (
    Recommended("timm/tf_efficientnet_lite0", "74.8 (224 px)"),
    Recommended("timm/tf_efficientnet_lite1", "76.6 (240 px)"),
    Recommended("timm/tf_efficientnet_lite2", "77.5 (260 px)"),
    Recommended("timm/mobilenetv4_conv_medium.e500_r256_in1k", "79.9 (256 px)"),
    Recommended("timm/hgnetv2_b0.ssld_stage2_ft_in1k", "unknown"),
    Recommended("timm/hgnetv2_b2.ssld_stage2_ft_in1k", "unknown"),
    Recommended("timm/regnety_016.tv2_in1k", "80.7 (224 px)"),
    Recommended("timm/resnet50.a1_in1k", "81.2 (288 px)"),
    Recommended("timm/convnextv2_nano.fcmae_ft_in22k_in1k", "82.7 (288 px)"),
    Recommended("timm/convnext_nano.in12k_ft_in1k", "82.9 (288 px)"),
    Recommended("timm/convnext_tiny.in12k_ft_in1k", "84.5 (288 px)"),
    Recommended("timm/convnext_small.in12k_ft_in1k", "85.3 (288 px)"),
    Recommended("timm/convnext_tiny.dinov3_lvd1689m", NO_CLASSIFIER),
    Recommended("timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", "81.0 (224 px)"),
    Recommended("timm/eva02_small_patch14_336.mim_in22k_ft_in1k", "85.7 (336 px)"),
    Recommended("timm/vit_small_patch14_reg4_dinov2.lvd142m", NO_CLASSIFIER),
    Recommended("timm/vit_base_patch14_reg4_dinov2.lvd142m", NO_CLASSIFIER),
    Recommended("timm/vit_small_patch16_dinov3.lvd1689m", NO_CLASSIFIER),
    Recommended("timm/vit_base_patch16_clip_224.openai", NO_CLASSIFIER),
    Recommended("timm/vit_base_patch16_siglip_224.v2_webli", NO_CLASSIFIER),
)
HEADER = (
    *("`backbone.name`", "parameters", "input", "images a second", "ImageNet top-1", "licence"),
    "weights from",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, help="measure so many of the networks")
    options = parser.parse_args()
    set_up_torch()
    measured = RECOMMENDED[: options.first]
    rates: dict[str, list[float]] = {one.name: [] for one in measured}
    turns = [one.name for _ in range(options.rounds) for one in measured]
    for name in track(turns, len(turns), "measurements", summary=False):
        rates[name].append(images_per_second(network(name)))
    say(_line(HEADER))
    say("|---" * len(HEADER) + "|")
    for one in measured:
        say(row(one, f"{median(rates[one.name]):.0f}"))
    say(f"\n{threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {resolved('auto')}")


def network(name: str) -> Network:
    """Build a network as `extract` does, with drawn weights."""
    model, backbone = pretrained(name, "none", "", seed=0)
    model.eval().requires_grad_(False)
    packed = Facts(["a", "b"], PACKED, "squash", 3, "raw", "")
    return for_images(model, backbone, packed, "auto", resolved("auto"))


@torch.inference_mode()
def images_per_second(one: Network) -> float:
    """Time the forward pass on batches of the size that `extract` uses."""
    shape = (EVAL_BATCH, one.packed_size, one.packed_size, 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    one.model(one.normalise(pixels))
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < LEAST_SECONDS:
        one.model(one.normalise(pixels))
        n += EVAL_BATCH
    return n / (time.perf_counter() - start)


def row(one: Recommended, rate: str) -> str:
    """Return a network's row of the table."""
    model = skeleton(one.name)
    size = input_size(model, "auto", PACKED)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    licence = licence_of(one.name, "imagenet")
    comes = "a Python package" if one.name in PACKAGED else "Hugging Face"
    cells = (f"`{one.name}`", f"{parameters:.1f} M", f"{size} px", rate, one.top1, licence, comes)
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
