"""A finished classifier as one ONNX graph: from packed pixels to calibrated probabilities.

Everything is in the graph: normalisation, the averaging over flips, the network, and for a probe
the scaling, the kernel and its machines. Who runs it needs neither PyTorch nor this project.
"""

import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.classifier import Classifier
from pipeline.errors import CheckpointError
from pipeline.images.augment import dihedral, views
from pipeline.learn.probes import Probe
from pipeline.nets.backbone import build
from pipeline.nets.depths import JOIN
from pipeline.nets.network import EVAL_BATCH
from pipeline.nets.taps import Taps

KEY = "pipeline"  # of the graph's metadata


@dataclass(frozen=True)
class Inputs:
    """What the graph takes, and the classes it answers with."""

    classes: list[str]
    packed_size: int  # pixels a side
    fit: Literal["squash", "crop", "pad"]  # how an image becomes a square
    channels: int  # 1 for grey, else 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of one packed image."""
        sides = (self.packed_size, self.packed_size)
        return sides if self.channels == 1 else (*sides, self.channels)


class Graph(nn.Module):
    """The whole of a classifier in float32, unfolded: what PyTorch runs and what is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        trained = classifier.network
        self.model = build(trained.backbone.name, trained.n_outputs)
        self.model.load_state_dict(trained.model.state_dict())
        self.model.requires_grad_(False)
        self.network = replace(trained, model=self.model, precision="fp32")
        self.inputs = Inputs(trained.classes, trained.packed_size, trained.fit, trained.channels)
        self.kinds = views(classifier.viewing.flips, classifier.viewing.most)
        self.temperature = classifier.temperature
        self.taps: Taps | None = None
        self.machine: Machine | None = None
        if classifier.probe is not None:
            self.taps = Taps(self.model, classifier.probe.depth.split(JOIN), classifier.pooling)
            self.machine = Machine(classifier.probe)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Give probabilities (N, C) of packed uint8 pixels (N, H, W) or (N, H, W, 3)."""
        # The views side by side as one batch: a graph of one network, not of eight.
        x = self.network.normalise(pixels)
        x = torch.cat([dihedral(x, kind, rows=2) for kind in self.kinds])
        found = torch.cat(self.taps(x), 1) if self.taps else self.model(x)
        mean = found.view(len(self.kinds), -1, found.shape[1]).mean(0)  # (N, D) or (N, C)
        scores = self.machine(mean) if self.machine else mean
        return torch.softmax(scores / self.temperature, 1).float()


class Machine:
    """A probe's scores in PyTorch: `Probe.scores`, in double precision as there."""

    def __init__(self, probe: Probe) -> None:
        self.kind, self.gamma, self.l2 = probe.kind, probe.gamma, probe.l2
        self.arrays = {k: torch.from_numpy(np.array(a)) for k, a in probe.arrays.items()}
        ends = [int(end) for end in np.cumsum(probe.arrays.get("n_vectors", []))]
        # Where the vectors of each class lie.
        self.of = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def __call__(self, codes: Tensor) -> Tensor:
        """Score codes (N, D): (N, C)."""
        a = self.arrays
        if self.l2:
            length = codes.norm(dim=1, keepdim=True)
            codes = codes / torch.where(length > 0, length, 1)
        x = (codes.double() - a["mean"]) / a["scale"]
        if self.kind == "linear":
            return x @ a["weight"].T + a["bias"]
        kernel = x @ a["vectors"].T
        if self.kind == "svm_rbf":
            squares = (x**2).sum(1, keepdim=True) + (a["vectors"] ** 2).sum(1) - 2 * kernel
            kernel = torch.exp(-self.gamma * squares.clamp(min=0))
        return self._one_against_one(kernel)

    def _one_against_one(self, kernel: Tensor) -> Tensor:
        a, of = self.arrays, self.of
        pairs = [(i, j) for i in range(len(of)) for j in range(i + 1, len(of))]
        votes = [torch.zeros_like(kernel[:, 0]) for _ in of]
        sums = [torch.zeros_like(kernel[:, 0]) for _ in of]
        for place, (i, j) in enumerate(pairs):
            for_i = kernel[:, of[i]] @ a["dual"][j - 1, of[i]] + a["bias"][place]
            for_i = for_i + kernel[:, of[j]] @ a["dual"][i, of[j]]
            if len(of) == 2:
                return torch.stack([for_i, -for_i], 1) / 2
            won = (for_i > 0).double()
            votes[i], votes[j] = votes[i] + won, votes[j] + (1 - won)
            sums[i], sums[j] = sums[i] + for_i, sums[j] - for_i
        total = torch.stack(sums, 1)
        return torch.stack(votes, 1) + total / (3 * (total.abs() + 1))


def write(classifier: Classifier, graph: Graph, file: Path) -> None:
    """Write the graph, with what `Portable` needs of the classifier as metadata."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        program = torch.onnx.export(
            graph,
            (torch.zeros((2, *graph.inputs.shape), dtype=torch.uint8),),
            input_names=["pixels"],
            output_names=["probabilities"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("n", min=1, max=65536)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    more = {"sure_above": classifier.sure_above, "chosen": classifier.chosen}
    facts = {**asdict(graph.inputs), **more}
    program.model.metadata_props[KEY] = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    program.save(str(file), external_data=False)


class Portable:
    """A classifier read from ONNX; it answers like `Classifier`."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        except Exception as error:  # of its own kinds, for a missing and for a damaged file
            said = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{file}: can't be read as ONNX ({said})") from None
        found = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if found is None:
            raise CheckpointError(f"{file}: not written by `python -m pipeline.export`")
        facts: dict[str, Any] = json.loads(found)
        self.sure_above: float = facts.pop("sure_above")
        self.chosen: str = facts.pop("chosen")
        self.network = Inputs(**facts)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Give calibrated probabilities (N, C) of packed images (N, H, W[, 3])."""
        batches = np.array_split(images, max(1, -(-len(images) // EVAL_BATCH)))
        parts = [self.session.run(None, {"pixels": np.ascontiguousarray(b)})[0] for b in batches]
        return np.concatenate(parts).astype(np.float64)
