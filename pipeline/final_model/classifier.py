"""The final classifier: one network or several, probes on their codes, and a threshold."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.final_model.mixture import Mixture
from pipeline.final_model.operating_point import Decision
from pipeline.images.augment import views
from pipeline.inference.taps import Pooling, Taps
from pipeline.inference.tta import TTA, averaged, logits
from pipeline.nets import checkpoint
from pipeline.nets.batches import run_in_batches
from pipeline.nets.network import Network, from_checkpoint
from pipeline.probing.codes import JOIN
from pipeline.probing.probes import Probe
from pipeline.stage_runtime.errors import CheckpointError
from pipeline.stage_runtime.files import Rowwise
from pipeline.statistics.reliability import sure_in_words

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
class Member:
    """A network with its own head, or with a probe on its codes."""

    name: str  # the model of evaluate that it is
    network: Network
    probe: Probe | None  # on the network's codes; None: the network's own head
    pooling: Pooling  # of those codes
    tta: TTA
    temperature: float = 1.0  # softmax(scores / temperature) is what is averaged
    weight: float = 1.0

    def scores(self, images: Rowwise) -> Scores:
        """Return scores (N, C) of packed images (N, H, W[, 3])."""
        if self.probe is None:
            return logits(self.network, images, self.tta)
        return self.probe.scores(
            codes(self.network, self.probe.depth, self.pooling, images, self.tta)
        )

    @property
    def words(self) -> str:
        """Say what it is."""
        head = f"{self.probe.kind} on codes of {self.probe.depth}" if self.probe else "its own head"
        n_views = len(views(self.tta.flips, self.tta.most))
        return f"{self.name}, {head}, {self.network.image_size} px, {n_views} views"

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of a file."""
        state = self.network.model.state_dict()
        found = {f"network.{name}": t.contiguous().cpu().numpy() for name, t in state.items()}
        if self.probe:
            found.update({f"probe.{name}": a for name, a in self.probe.arrays.items()})
        return found

    def facts(self) -> dict[str, Any]:
        """Return everything except the arrays, for the metadata of a file."""
        return {
            **self.network.facts(),
            "member": self.name,
            "n_outputs": self.network.n_outputs,
            "probe": self.probe and self.probe.facts(),
            "pooling": self.pooling,
            "viewing": asdict(self.tta),
            "member_temperature": self.temperature,
            "weight": self.weight,
        }


@dataclass(frozen=True)
class Classifier:
    """The contents of models/final/: a complete classifier, whichever models it is made of."""

    members: Sequence[Member]  # of which the weighted mean of the probabilities is taken
    temperature: float  # of this mean
    decision: Decision
    chosen: str  # the model that evaluate chose
    sure_in_words: str = ""  # when it says "not sure"

    @property
    def network(self) -> Network:
        """Return the first network; its classes and the images that it takes are those of all."""
        return self.members[0].network

    def probabilities(self, images: Rowwise) -> Scores:
        """Return calibrated probabilities (N, C) of packed images (N, H, W[, 3])."""
        scores = [member.scores(images) for member in self.members]
        return np.asarray(np.exp(self.mixture.log_probabilities(scores)))

    @property
    def mixture(self) -> Mixture:
        """Return how the members are averaged."""
        weights = [member.weight for member in self.members]
        return Mixture(weights, [m.temperature for m in self.members], self.temperature)

    @property
    def words(self) -> str:
        """Say what it is made of."""
        return "; ".join(
            member.words + (f", weight {member.weight:.2f}" if len(self.members) > 1 else "")
            for member in self.members
        )

    def save(self, file: Path, **more: Any) -> None:
        """Write everything into one safetensors file; `more` is added to the metadata.

        The first member is written as a final model of one member is.
        """
        first, *others = self.members
        tensors = first.tensors()
        for place, member in enumerate(others, 1):
            tensors.update({f"{place}.{name}": array for name, array in member.tensors().items()})
        meta = {
            **first.facts(),
            "members": [member.facts() for member in others],
            "temperature": self.temperature,
            **self.decision.facts(),
            "sure_in_words": self.sure_in_words,
            "chosen": self.chosen,
            **more,
        }
        checkpoint.write(file, tensors, meta)


def load(file: Path) -> Classifier:
    """Read what `Classifier.save` wrote, in this version or an earlier one.

    Raises CheckpointError if the file holds no final model.
    """
    tensors, meta = checkpoint.read(file)
    if "sure_above" not in meta:
        raise CheckpointError(f"{file}: not a final model; use models/final/model.safetensors")
    with checkpoint.checked_metadata(file):
        members = [_member(tensors, meta, file)]
        for place, facts in enumerate(meta.get("members", []), 1):
            members.append(_member(checkpoint.strip_prefix(tensors, f"{place}."), facts, file))
        return Classifier(
            members,
            meta["temperature"],
            Decision.of_facts(meta, len(members[0].network.classes)),
            meta["chosen"],
            meta.get("sure_in_words") or _sure_in_words(meta),
        )


def _sure_in_words(meta: dict[str, Any]) -> str:
    """Say it of a file of an earlier version."""
    return sure_in_words(
        meta["sure_above"], meta.get("sure_accuracy", 0.95), meta.get("sure_images")
    )


def _member(tensors: dict[str, NDArray[Any]], meta: dict[str, Any], file: Path) -> Member:
    of_network, of_probe = (checkpoint.strip_prefix(tensors, f"{p}.") for p in ("network", "probe"))
    network = from_checkpoint(of_network, meta, file, n_outputs=meta["n_outputs"])
    return Member(
        meta.get("member") or meta["chosen"],
        network,
        Probe(**meta["probe"], arrays=of_probe) if meta["probe"] else None,
        meta["pooling"],
        TTA(**meta["viewing"]),
        meta.get("member_temperature", Member.temperature),
        meta.get("weight", Member.weight),
    )
