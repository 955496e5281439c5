"""The resume state of a training run: saved after each epoch, and regularly within long epochs."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.nets import checkpoint
from pipeline.stage_runtime.errors import CheckpointError
from pipeline.stage_runtime.progress import say
from pipeline.stage_runtime.settings import rank, save_seconds
from pipeline.training.average import Average


@dataclass(frozen=True)
class Position:
    """A position in training: before this step of this epoch."""

    epoch: int
    step: int = 0
    loss: float = 0.0  # summed over the epoch's steps so far
    right: int = 0  # images, likewise


@dataclass
class Kept:
    """What is saved besides the network and the optimiser: JSON, and the best weights."""

    facts: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


class ResumeState:
    """The state of a training run in one file, replaced as a whole."""

    def __init__(self, file: Path) -> None:
        self.file, self.kept = file, Kept()
        self._saved = time.monotonic()
        self._tensors: dict[str, Tensor] = {}
        self._facts: dict[str, Any] = {}
        if file.exists():
            try:
                arrays, self._facts = checkpoint.read(file)
            except CheckpointError as error:
                say(f"{error}; starting from the beginning")
                return
            self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            self.kept = Kept(self._facts["kept"], checkpoint.strip_prefix(self._tensors, "best."))

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
    ) -> Position:
        """Restore network, optimiser, averaged weights and random state; return the position.

        The optimiser's tensors get their parameter's layout, which its fused kernels rely on.
        """
        if not self._tensors:
            return Position(1)
        place = Position(**self._facts["place"])
        model.load_state_dict(checkpoint.strip_prefix(self._tensors, "model."))
        settings = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.strip_prefix(self._tensors, "optimizer.").items():
            number, _, key = name.partition(".")
            like = parameters[int(number)]
            same = tensor.shape == like.shape
            state.setdefault(int(number), {})[key] = (
                torch.empty_like(like).copy_(tensor) if same else tensor
            )
        optimizer.load_state_dict({**settings, "state": state})
        if average:
            average.resume(checkpoint.strip_prefix(self._tensors, "average."))
        if place.step:
            torch.set_rng_state(self._tensors["random"])
            for kind, library in _of_devices():
                if f"random_{kind}" in self._tensors:
                    library.set_rng_state(self._tensors[f"random_{kind}"])
        self._tensors = {}
        at = f", step {place.step}" if place.step else ""
        say(f"resuming at epoch {place.epoch}{at}")
        return place

    def is_due(self) -> bool:
        """Return whether it is time to save again."""
        return time.monotonic() - self._saved >= save_seconds()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        place: Position,
        average: Average | None = None,
    ) -> None:
        """Save the state of training. All processes have the same state; the first one writes."""
        if rank() > 0:
            return
        states = optimizer.state_dict()["state"].items()
        tensors = {
            **{f"model.{name}": t for name, t in model.state_dict().items()},
            **{f"best.{name}": t for name, t in self.kept.best.items()},
            **{f"average.{name}": t for name, t in (average.tensors if average else {}).items()},
            **{f"optimizer.{i}.{k}": t for i, s in states for k, t in s.items() if t is not None},
            "random": torch.get_rng_state(),
        }
        for kind, library in _of_devices():
            tensors[f"random_{kind}"] = library.get_rng_state()
        arrays = {name: t.detach().contiguous().cpu().numpy() for name, t in tensors.items()}
        checkpoint.write(self.file, arrays, {"place": asdict(place), "kept": self.kept.facts})
        self._saved = time.monotonic()


def _of_devices() -> Iterator[tuple[str, Any]]:
    """Yield the libraries of the available GPUs, which have their own random states."""
    if torch.cuda.is_available():
        yield "cuda", torch.cuda
    if torch.backends.mps.is_available():
        yield "mps", torch.mps
