"""A finished classifier: a network, perhaps a probe on its codes, and how sure it has to be."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.images.augment import Flips, dihedral, views
from pipeline.learn.probes import Probe
from pipeline.nets import checkpoint
from pipeline.nets.network import Network, from_checkpoint, over
from pipeline.nets.taps import Taps

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Viewing:
    """Which flips and turns of an image a prediction is averaged over."""

    flips: Flips
    most: int


def scores(
    network: Network, probes: Sequence[Probe], images: NDArray[np.uint8], viewing: Viewing
) -> list[Scores]:
    """Score packed images (N, H, W[, 3]): one (N, C) a probe, or the network's logits if none.

    All probes share the network's passes; scores are averaged over the views.
    """
    network.model.eval()
    kinds = views(viewing.flips, viewing.most)
    totals: list[Any] = [0.0] * max(len(probes), 1)
    with Taps(network.model, [probe.depth for probe in probes]) as taps:
        for kind in kinds:

            def run(pixels: Tensor, kind: int = kind) -> Sequence[Tensor]:
                x = network.normalise(dihedral(pixels, kind))
                return taps(x) if probes else [network.model(x)]

            parts = list(over(images, run))
            outputs = [np.concatenate(column) for column in zip(*parts, strict=True)]
            for i in range(len(totals)):
                totals[i] = totals[i] + (probes[i].scores(outputs[i]) if probes else outputs[i])
    return [np.asarray(total / len(kinds), np.float64) for total in totals]


@dataclass(frozen=True)
class Classifier:
    """What models/final/ holds: it classifies images by itself, whichever stage won."""

    network: Network
    probe: Probe | None  # on the network's codes; None: the network's own head
    viewing: Viewing
    temperature: float  # softmax(scores / temperature) is calibrated on validation
    sure_above: float  # below this probability the answer is "not sure"
    chosen: str  # the stage it comes from

    def probabilities(self, images: NDArray[np.uint8]) -> Scores:
        """Give calibrated probabilities (N, C) of packed images (N, H, W[, 3])."""
        probes = [self.probe] if self.probe else []
        found = scores(self.network, probes, images, self.viewing)[0]
        return np.asarray(softmax(found / self.temperature, axis=1))

    def save(self, file: Path) -> None:
        """Write everything into one safetensors file."""
        state = self.network.model.state_dict()
        tensors = {f"network.{name}": t.contiguous().numpy() for name, t in state.items()}
        if self.probe:
            tensors.update({f"probe.{name}": a for name, a in self.probe.arrays.items()})
        meta = {
            **self.network.facts(),
            "n_outputs": self.network.n_outputs,
            "probe": self.probe and self.probe.facts(),
            "viewing": asdict(self.viewing),
            "temperature": self.temperature,
            "sure_above": self.sure_above,
            "chosen": self.chosen,
        }
        checkpoint.write(file, tensors, meta)


def load(file: Path) -> Classifier:
    """Read what `Classifier.save` wrote.

    Raises CheckpointError if the file isn't such a one.
    """
    tensors, meta = checkpoint.read(file)
    if "sure_above" not in meta:
        raise CheckpointError(f"{file}: no final model; take models/final/model.safetensors")

    def part(prefix: str) -> dict[str, NDArray[Any]]:
        return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}

    network = from_checkpoint(part("network."), meta, file, n_outputs=meta["n_outputs"])
    probe = Probe(**meta["probe"], arrays=part("probe.")) if meta["probe"] else None
    return Classifier(
        network,
        probe,
        Viewing(**meta["viewing"]),
        meta["temperature"],
        meta["sure_above"],
        meta["chosen"],
    )
