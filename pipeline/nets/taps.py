"""CNN codes at several depths in one forward pass."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.nets.backbone import head_name

LAST = "last"  # the depth of the head's input


class Taps:
    """Collects globally average-pooled activations while a network runs."""

    def __init__(self, model: nn.Module, depths: Sequence[str]) -> None:
        self.model = model
        self.depths = [*depths, LAST]
        self._codes: dict[str, Tensor] = {}
        for depth in depths:
            model.get_submodule(depth).register_forward_hook(self._pooled(depth))
        model.get_submodule(head_name(model)).register_forward_pre_hook(self._head_input)

    def _pooled(self, depth: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._codes[depth] = output.float().mean((2, 3))  # (B, D, h, w) -> (B, D)

        return hook

    def _head_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._codes[LAST] = inputs[0].float()  # (B, D)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute the codes of normalised images (B, 3, H, W): one (B, D) a depth."""
        self._codes.clear()
        self.model(x)
        return [self._codes[depth] for depth in self.depths]
