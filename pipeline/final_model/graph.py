"""The final classifier in plain PyTorch: from packed pixels to calibrated probabilities.

It is in float32 and unfolded, with everything in one graph: normalisation, averaging over flips,
the network, and for a probe the scaling, the kernel and the SVMs. export writes it as ONNX, and
class activation maps are computed from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.final_model.classifier import Classifier, Member
from pipeline.images.augment import dihedral, views
from pipeline.images.tones import PLAIN, Tones
from pipeline.inference.taps import Taps
from pipeline.nets.backbone import build
from pipeline.probing.codes import JOIN
from pipeline.probing.probes import SHARPNESS, Probe


@dataclass(frozen=True)
class Inputs:
    """The inputs of the graph, and its classes."""

    classes: list[str]
    packed_size: int  # pixels a side
    fit: Literal["squash", "crop", "pad"]  # how an image becomes a square
    channels: int  # 1 for grey, else 3
    tones: Tones = PLAIN

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one packed image."""
        sides = (self.packed_size, self.packed_size)
        return sides if self.channels == 1 else (*sides, self.channels)


class Part(nn.Module):
    """A member of the classifier in float32, unfolded."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        trained = member.network
        self.model = build(trained.backbone.name, trained.n_outputs)
        self.model.load_state_dict(trained.model.state_dict())
        self.model.requires_grad_(False)
        self.network = replace(trained, model=self.model, precision="fp32")
        self.kinds = views(member.tta.flips, member.tta.most)
        self.temperature, self.weight = member.temperature, member.weight
        self.taps: Taps | None = None
        self.svm: SvmHead | None = None
        if member.probe is not None:
            self.taps = Taps(self.model, member.probe.depth.split(JOIN), member.pooling)
            self.svm = SvmHead(member.probe)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return log probabilities (N, C) of packed uint8 pixels (N, H, W) or (N, H, W, 3)."""
        return torch.log_softmax(self.scores(pixels, self.kinds).double() / self.temperature, 1)

    def scores(self, pixels: Tensor, kinds: Sequence[int]) -> Tensor:
        """Return scores (N, C), averaged over these kinds of flips and turns."""
        # All views are one batch, so that the graph holds the network once, not eight times.
        x = self.network.normalise(pixels)
        x = torch.cat([dihedral(x, kind, rows=2) for kind in kinds])
        found = torch.cat(self.taps(x), 1) if self.taps else self.model(x)
        mean = found.view(len(kinds), -1, found.shape[1]).mean(0)  # (N, D) or (N, C)
        return self.svm(mean) if self.svm else mean


class Graph(nn.Module):
    """The whole classifier in float32, unfolded: for PyTorch and for export."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        of_all = classifier.network
        self.inputs = Inputs(
            of_all.classes, of_all.packed_size, of_all.fit, of_all.channels, of_all.tones
        )
        self.parts = [Part(member) for member in classifier.members]
        self.registered = nn.ModuleList(self.parts)  # with PyTorch, which ignores plain lists
        self.temperature = classifier.temperature
        self.point = classifier.decision.point
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities (N, C) and answers (N,) of packed uint8 pixels (N, H, W[, 3])."""
        p = self.probabilities(pixels)
        return p, self._answers(p)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return probabilities (N, C) of packed uint8 pixels (N, H, W) or (N, H, W, 3)."""
        # log(weight x probability) of each part, of which the sum over parts is taken.
        each = [part(pixels) + math.log(part.weight) for part in self.parts]
        mean = torch.logsumexp(torch.stack(each), 0) if len(each) > 1 else each[0]
        return torch.softmax(mean / self.temperature, 1).float()

    def _answers(self, p: Tensor) -> Tensor:
        """Return what `Decision.answers` does."""
        if self.point is None:
            return p.argmax(1)
        if self.point.costs is not None:
            return (p.double() @ torch.tensor(self.point.costs, dtype=torch.float64)).argmin(1)
        positive, threshold = self.point.positive, self.point.threshold
        assert positive is not None
        assert threshold is not None
        is_other = torch.tensor([i != positive for i in range(p.shape[1])])
        others = torch.where(is_other, p, -1.0).argmax(1)
        return torch.where(p[:, positive] >= threshold, positive, others)


class SvmHead:
    """`Probe.scores` in PyTorch, in double precision too."""

    def __init__(self, probe: Probe) -> None:
        self.kind, self.gamma, self.l2 = probe.kind, probe.gamma, probe.l2
        self.arrays = {k: torch.from_numpy(np.array(a)) for k, a in probe.arrays.items()}
        ends = [int(end) for end in np.cumsum(probe.arrays.get("n_vectors", []))]
        # The positions of each class's vectors.
        self.of = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def __call__(self, codes: Tensor) -> Tensor:
        """Return scores (N, C) of codes (N, D)."""
        a = self.arrays
        if self.l2:
            length = codes.norm(dim=1, keepdim=True)
            codes = codes / torch.where(length > 0, length, 1)
        x = (codes.double() - a["mean"]) / a["scale"]
        if "weight" in a:
            return x @ a["weight"].T + a["bias"]
        kernel = x @ a["vectors"].T
        if self.kind == "svm_rbf":
            squares = (x**2).sum(1, keepdim=True) + (a["vectors"] ** 2).sum(1) - 2 * kernel
            kernel = torch.exp(-self.gamma * squares.clamp(min=0))
        return self._one_against_one(kernel)

    def _one_against_one(self, kernel: Tensor) -> Tensor:
        """Score with one binary classifier per pair of classes, as in `probing.probes.coupled`."""
        dual, bias, of = self.arrays["dual"], self.arrays["bias"], self.of
        if len(of) == 2:
            first = kernel[:, of[0]] @ dual[0, of[0]] + kernel[:, of[1]] @ dual[0, of[1]] + bias[0]
            return torch.stack([first, -first], 1) / 2
        n = len(of)
        none = torch.zeros_like(kernel[:, :1])
        own = []  # the contribution of each class's vectors against each other class: (N, C)
        for i in range(n):
            found = kernel[:, of[i]] @ dual[:, of[i]].T  # (N, C - 1)
            own.append(torch.cat([found[:, :i], none, found[:, i:]], 1))
        biases, signs = torch.zeros(n, n, dtype=bias.dtype), torch.zeros(n, n, dtype=bias.dtype)
        rows, columns = torch.triu_indices(n, n, 1)
        biases[rows, columns] = biases[columns, rows] = bias
        signs[rows, columns], signs[columns, rows] = 1.0, -1.0
        both = torch.stack(own, 1)  # (N, C, C)
        pairs = signs * (both + both.transpose(1, 2) + biases)
        return -torch.logsumexp(-SHARPNESS * pairs, 2)
