"""An exponential moving average of the weights that train (EMA).

The average depends less on the order of the images and on rounding than the last weights do (Polyak
and Juditsky 1992, SIAM J. Control Optim. 30; Morales-Brotons et al. 2024, arXiv 2411.18704).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of a network's trainable parameters and of its buffers, over some steps."""

    def __init__(self, model: nn.Module, window: float) -> None:
        """Start at the network's weights; `window` is about the number of steps averaged over."""
        self._decay = 1 - 1 / max(window, 1.0)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        trained |= {name for name, b in model.named_buffers() if b.is_floating_point()}
        # Optimisers and load_state_dict change these tensors in place.
        self._live = {name: t for name, t in model.state_dict().items() if name in trained}
        self.tensors: dict[str, Tensor] = {name: t.clone() for name, t in self._live.items()}

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Take the average of a run that was killed."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after this step, counted from 1: the first ones count for less."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self.tensors.values()], [*self._live.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the network's weights for their average."""
        trained = {name: t.clone() for name, t in self._live.items()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(trained)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._live[name].copy_(tensor)
