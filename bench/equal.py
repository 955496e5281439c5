"""Compare our codes with those of the network as PyTorch runs it.

    python -m bench.equal                  # after `dvc repro probe`; exits with 1 if they differ
    python -m bench.equal --images 100     # a quick look

Our network is folded and in bf16; PyTorch's is eager and in fp32. The measures are the cosine
between the last codes of each image, and the accuracy of a linear probe on either codes, on all
images that it isn't trained on.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bench.ratios import BATCH, PREPARED, WHOLE, network, unfolded
from pipeline.images.shards import SPLITS, read_images, read_rows
from pipeline.inference.taps import Taps
from pipeline.inference.tta import TTA, averaged
from pipeline.nets.backbone import head_name
from pipeline.nets.batches import run_in_batches
from pipeline.nets.device import set_up_torch
from pipeline.nets.network import Network
from pipeline.probing.codes import LAST
from pipeline.stage_runtime.progress import say

C = 0.1  # of the linear probe on the last codes that the default run chooses
LEAST_COSINE, MOST_POINTS = 0.995, 0.5

Codes = NDArray[np.float32]


def main() -> None:
    """Compute, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--images", type=int, help="to compare on so many of each split")
    most = parser.parse_args().images
    set_up_torch()
    ours = network(WHOLE)
    own: dict[str, Codes] = {}
    theirs: dict[str, Codes] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    for split in SPLITS:
        images = read_images(PREPARED, split)[:most]
        labels[split] = read_rows(PREPARED, split).labels[:most]
        own[split] = our_codes(ours, images)
        theirs[split] = np.concatenate(list(plain_codes(ours, images)))
    cosines = np.concatenate([cosine(own[split], theirs[split]) for split in SPLITS])
    say(f"cosine of {len(cosines)} codes: median {np.median(cosines):.4f}, min {cosines.min():.4f}")
    accuracies = [probed(codes, labels) for codes in (own, theirs)]
    points = 100 * (accuracies[0] - accuracies[1])
    say(f"linear probe: ours {accuracies[0]:.4f}, theirs {accuracies[1]:.4f}: {points:+.2f} points")
    sys.exit(bool(np.median(cosines) < LEAST_COSINE or abs(points) > MOST_POINTS))


def our_codes(ours: Network, images: NDArray[np.uint8]) -> Codes:
    """Compute the last codes (N, D) as extract does, without flips."""
    with Taps(ours.model, [LAST], "average") as taps:
        parts = run_in_batches(images, ours, averaged(ours, taps, TTA("none", 1)))
        return np.concatenate([part[0] for part in parts])


def plain_codes(ours: Network, images: NDArray[np.uint8]) -> Iterator[Codes]:
    """Compute the same codes with the network as PyTorch runs it, normalised as in torchvision."""
    plain = unfolded()
    kept: list[torch.Tensor] = []
    head = plain.get_submodule(head_name(plain))
    head.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (ours.backbone.mean, ours.backbone.std))
    for start in range(0, len(images), BATCH):
        # The default images are grey: one plane, three times.
        pixels = torch.tensor(images[start : start + BATCH]).float() / 255
        with torch.inference_mode():
            plain((pixels[:, None].expand(-1, 3, -1, -1) - mean) / std)
        yield kept.pop().numpy()


def cosine(a: Codes, b: Codes) -> NDArray[np.float32]:
    """Return the cosine (N,) of each pair of codes (N, D)."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / norms, np.float32)


def probed(codes: dict[str, Codes], labels: dict[str, NDArray[np.int64]]) -> float:
    """Fit a linear probe on train and return its accuracy on the other splits together."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))
    model.fit(codes["train"], labels["train"])
    rest = [split for split in SPLITS if split != "train"]
    x, y = (np.concatenate([of[split] for split in rest]) for of in (codes, labels))
    return float(model.score(x, y))


if __name__ == "__main__":
    main()
