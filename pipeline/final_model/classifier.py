"""The final classifier: a network, possibly a probe on its codes, and a confidence threshold."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from pipeline.inference.taps import Pooling, Taps
from pipeline.inference.tta import TTA, averaged, logits
from pipeline.nets import checkpoint
from pipeline.nets.batches import run_in_batches
from pipeline.nets.network import Network, from_checkpoint
from pipeline.probing.codes import JOIN
from pipeline.probing.probes import Probe
from pipeline.stage_runtime.errors import CheckpointError
from pipeline.stage_runtime.files import Rowwise

Scores = NDArray[np.float64]


def codes(
    network: Network, depth: str, pooling: Pooling, images: Rowwise, tta: TTA
) -> NDArray[np.float32]:
    """Compute codes (N, D) of packed images, averaged over views as extract does."""
    network.model.eval()
    with Taps(network.model, depth.split(JOIN), pooling) as taps:
        parts = run_in_batches(images, network, averaged(network, taps, tta))
        return np.concatenate([np.concatenate(part, axis=1) for part in parts])


@dataclass(frozen=True)
class Classifier:
    """The contents of models/final/: a complete classifier, whichever stage was chosen."""

    network: Network
    probe: Probe | None  # on the network's codes; None: the network's own head
    pooling: Pooling  # of those codes
    tta: TTA
    temperature: float  # softmax(scores / temperature) is calibrated on validation
    sure_above: float | None  # below this probability it says "not sure"; None: never
    chosen: str  # the stage it comes from
    sure_accuracy: float = 0.95  # the share that has to be right above `sure_above`
    sure_images: int | None = None  # validation images that a threshold would take, if known

    def probabilities(self, images: Rowwise) -> Scores:
        """Return calibrated probabilities (N, C) of packed images (N, H, W[, 3])."""
        if self.probe is None:
            scores = logits(self.network, images, self.tta)
        else:
            found = codes(self.network, self.probe.depth, self.pooling, images, self.tta)
            scores = self.probe.scores(found)
        return np.asarray(softmax(scores / self.temperature, axis=1))

    def save(self, file: Path, **more: Any) -> None:
        """Write everything into one safetensors file; `more` is added to the metadata."""
        state = self.network.model.state_dict()
        tensors = {f"network.{name}": t.contiguous().cpu().numpy() for name, t in state.items()}
        if self.probe:
            tensors.update({f"probe.{name}": a for name, a in self.probe.arrays.items()})
        meta = {
            **self.network.facts(),
            "n_outputs": self.network.n_outputs,
            "probe": self.probe and self.probe.facts(),
            "pooling": self.pooling,
            "viewing": asdict(self.tta),
            "temperature": self.temperature,
            "sure_above": self.sure_above,
            "sure_accuracy": self.sure_accuracy,
            "sure_images": self.sure_images,
            "chosen": self.chosen,
            **more,
        }
        checkpoint.write(file, tensors, meta)


def load(file: Path) -> Classifier:
    """Read what `Classifier.save` wrote.

    Raises CheckpointError if the file holds no final model.
    """
    tensors, meta = checkpoint.read(file)
    if "sure_above" not in meta:
        raise CheckpointError(f"{file}: not a final model; use models/final/model.safetensors")

    network_part, probe_part = (
        checkpoint.strip_prefix(tensors, f"{p}.") for p in ("network", "probe")
    )
    with checkpoint.checked_metadata(file):
        network = from_checkpoint(network_part, meta, file, n_outputs=meta["n_outputs"])
        probe = Probe(**meta["probe"], arrays=probe_part) if meta["probe"] else None
        return Classifier(
            network,
            probe,
            meta["pooling"],
            TTA(**meta["viewing"]),
            meta["temperature"],
            meta["sure_above"],
            meta["chosen"],
            meta.get("sure_accuracy", Classifier.sure_accuracy),
            meta.get("sure_images"),
        )
